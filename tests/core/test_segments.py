"""Frames of TCP segments: scapy reads back what was written, and a burst is the same as its segments one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from netstack.core.segments import SegmentWriter
from tests.core.ip_fakes import GUEST4, GUEST6, WORLD4, WORLD6
from tests.fakes import FakeLink
from tests.frames import judge, syn_options
from tests.world import GUEST_MAC

GATEWAY_MAC = bytes.fromhex("5255c0a80502")
PORTS = 80 << 16 | 40000

U32 = st.integers(0, 0xFFFFFFFF) | st.sampled_from((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
U16 = st.integers(0, 0xFFFF)


def _writer(link: FakeLink, ipv6: bool) -> SegmentWriter:
    src, dst = (WORLD6, GUEST6) if ipv6 else (WORLD4, GUEST4)
    return SegmentWriter(link, GUEST_MAC, GATEWAY_MAC, src, dst, PORTS)


def _sent(link: FakeLink) -> list[bytes]:
    link.flush()
    frames, link.frames = link.frames, []
    return frames


@given(
    ipv6=st.booleans(),
    prefix=st.sampled_from((0, 4, 12)),
    seq=U32,
    ack=U32,
    flags=st.integers(0, 255),
    window=U16,
    payload=st.binary(max_size=300) | st.builds(bytes, st.sampled_from((1400, 2047, 2048, 2049, 9000))),
    options=st.sampled_from((b"", syn_options(1460, None), syn_options(1460, 7))),
)
def test_scapy_reads_what_was_written(
    ipv6: bool, prefix: int, seq: int, ack: int, flags: int, window: int, payload: bytes, options: bytes
) -> None:
    link = FakeLink(mtu=65520, prefix=prefix)
    _writer(link, ipv6).send(seq, ack, flags, window, payload, options)
    (frame,) = _sent(link)
    judge(frame)
    ether = Ether(frame)
    assert (ether.dst, ether.src) == (GUEST_MAC.hex(":"), GATEWAY_MAC.hex(":"))
    ip = ether[IPv6 if ipv6 else IP]
    if ipv6:
        assert (ip.src, ip.dst, ip.hlim) == ("2001:db8::7", "fd00:c0a8:5::15", 64)
    else:
        # RFC 6864 4.1: atomic, so the identification means nothing and may be 0.
        assert (ip.src, ip.dst, ip.ttl, ip.flags, ip.id) == ("198.51.100.7", "192.168.5.15", 64, "DF", 0)
    tcp = ip[TCP]
    assert (tcp.sport, tcp.dport, tcp.seq, tcp.ack, int(tcp.flags), tcp.window, tcp.urgptr) == (
        80,
        40000,
        seq,
        ack,
        flags,
        window,
        0,
    )
    assert bytes(tcp)[20 : 4 * tcp.dataofs] == options
    assert bytes(tcp.payload)[: len(payload)] == payload


@given(
    ipv6=st.booleans(),
    prefix=st.sampled_from((0, 4, 10, 12)),
    mss=st.sampled_from((48, 52, 536, 1220, 1440, 1460, 8960)),
    k=st.integers(1, 7),
    seq=U32,
    ack=U32,
    window=U16,
    seed=st.integers(0, 2**32 - 1),
)
def test_a_burst_is_its_segments(
    ipv6: bool, prefix: int, mss: int, k: int, seq: int, ack: int, window: int, seed: int
) -> None:
    data = np.random.default_rng(seed).integers(0, 256, k * mss, dtype=np.uint8)
    if seed % 3 == 0:
        data[:] = 255 if seed % 2 else 0  # the two zeros of one's complement
    one, many = FakeLink(mtu=65520, prefix=prefix), FakeLink(mtu=65520, prefix=prefix)
    writer = _writer(one, ipv6)
    for i in range(k):
        piece = data[i * mss : (i + 1) * mss].tobytes()
        writer.send((seq + i * mss) & 0xFFFFFFFF, ack, 0x10, window, piece)
    burst = _writer(many, ipv6).write_burst(data, mss, seq, ack, 0x10, window)
    many.queue_burst(burst)
    frames = _sent(many)
    assert frames == _sent(one)
    judge(frames[-1])


def test_what_is_left_over_of_a_burst_is_not_sent() -> None:
    link = FakeLink(prefix=4)
    burst = _writer(link, False).write_burst(np.zeros(1000, dtype=np.uint8), 300, 0, 0, 0x10, 0)
    assert burst.shape == (3, 4 + 54 + 300)


@pytest.mark.parametrize("size", range(10))
def test_short_frames_are_padded_with_zeros(size: int) -> None:
    link = FakeLink()
    _writer(link, False).send(1, 2, 0x18, 3, b"\xff" * size)
    (frame,) = _sent(link)
    assert len(frame) == max(60, 54 + size)
    assert frame[54:] == (b"\xff" * size).ljust(6, b"\0")


def test_overhead_is_the_headers_before_the_payload() -> None:
    assert _writer(FakeLink(prefix=12), False).overhead == 54
    assert _writer(FakeLink(prefix=12), True).overhead == 74
