"""The virtio-net header: its layout (virtio 1.2 section 5.1.6) and what zeros say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netstack.wire.virtio_net import (
    GSO_TCPV4,
    GSO_TYPE_BEFORE,
    HEADER_LENGTH,
    NEEDS_CSUM,
    VirtioNet,
    parse_virtio_net,
    write_virtio_net,
)

# As a Linux kernel writes it before a SYN behind a tap: partial checksum, at 34 + 16.
SYN = bytes.fromhex("01 00 0000 0000 2200 1000 0000")


def test_the_header_that_a_kernel_writes() -> None:
    assert parse_virtio_net(SYN, 0) == VirtioNet(NEEDS_CSUM, 0, 0, 0, 34, 16, 0)


def test_fields_are_little_endian_and_in_their_places() -> None:
    written = write_virtio_net(NEEDS_CSUM, GSO_TCPV4, 0x0102, 0x0304, 0x0506, 0x0708)
    assert written == bytes.fromhex("01 01 0201 0403 0605 0807 0000")
    assert written[HEADER_LENGTH - GSO_TYPE_BEFORE] == GSO_TCPV4


def test_zeros_ask_for_nothing() -> None:
    assert not any(parse_virtio_net(bytes(HEADER_LENGTH), 0))


@given(st.binary(min_size=HEADER_LENGTH, max_size=HEADER_LENGTH), st.integers(0, 5))
def test_any_bytes_are_a_header_and_come_back_as_they_were(data: bytes, before: int) -> None:
    parsed = parse_virtio_net(bytes(before) + data + b"more", before)
    assert write_virtio_net(*parsed[:6]) == data[:10] + bytes(2)
