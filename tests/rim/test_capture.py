"""The pcapng writer: read back by dpkt and by the real tshark, and what it does when the disk is full."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import dpkt
import pytest
import trio
from dpkt import pcapng
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from netstack.host.capture import FLUSH_BYTES, Capture

WALL_NS = 1_795_180_763_123_456_789
ETHER = Ether(src="52:54:00:12:34:56", dst="52:55:c0:a8:05:02")


def frames_of_all_sorts() -> list[bytes]:
    return [
        bytes(frame)
        for frame in (
            ETHER / ARP(psrc="192.168.5.15", pdst="192.168.5.2"),
            ETHER / IP(src="192.168.5.15", dst="192.168.5.2") / ICMP() / Raw(b"x" * 33),
            ETHER
            / IP(src="192.168.5.15", dst="192.168.5.3")
            / UDP(sport=999, dport=53)
            / DNS(qd=DNSQR(qname="a.test")),
            ETHER / IPv6(src="fd00:c0a8:5::15", dst="fd00:c0a8:5::2") / TCP(sport=1000, dport=80, seq=1),
            ETHER / IP(src="192.168.5.15", dst="192.168.5.2", len=65520) / TCP(sport=1, dport=2) / Raw(b"y" * 65480),
        )
    ]


def blocks(path: Path) -> list[Any]:
    """Every block of a file, by dpkt."""
    data = path.read_bytes()
    kinds = {
        pcapng.PCAPNG_BT_SHB: pcapng.SectionHeaderBlockLE,
        pcapng.PCAPNG_BT_IDB: pcapng.InterfaceDescriptionBlockLE,
        pcapng.PCAPNG_BT_EPB: pcapng.EnhancedPacketBlockLE,
    }
    found = []
    while data:
        kind, length = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4))
        found.append(kinds[kind](data[:length]))
        data = data[length:]
    return found


def option(block: Any, code: int) -> bytes | None:
    return next((bytes(o.data) for o in block.opts if o.code == code), None)


def test_what_is_written_is_what_dpkt_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    capture = Capture(path)
    first, second = capture.add_link("unix:///run/a.sock"), capture.add_link("vde:///b#2")
    assert (first, second, capture.add_link("unix:///run/a.sock")) == (0, 1, 0)
    for length in range(5):  # all paddings
        capture.frame(first, bytes(range(length)), to_guest=False, wall_ns=WALL_NS)
    capture.frame(second, [b"head", memoryview(b"body"), bytearray(b"!")], to_guest=True, wall_ns=WALL_NS + 1)
    capture.frame(first, b"bad", to_guest=False, comment="drop: ipv4_header", wall_ns=WALL_NS)
    capture.close()
    capture.close()
    section, link1, link2, *packets = blocks(path)
    assert option(section, pcapng.PCAPNG_OPT_SHB_USERAPPL) == b"netstack"
    assert option(link1, pcapng.PCAPNG_OPT_IF_NAME) == b"unix:///run/a.sock"
    assert option(link2, pcapng.PCAPNG_OPT_IF_NAME) == b"vde:///b#2"
    assert option(link1, pcapng.PCAPNG_OPT_IF_TSRESOL) == b"\x09"
    assert (link1.linktype, link1.snaplen) == (1, 0)
    assert [packet.pkt_data for packet in packets] == [*(bytes(range(n)) for n in range(5)), b"headbody!", b"bad"]
    assert [packet.iface_id for packet in packets] == [0] * 5 + [1, 0]
    assert [packet.ts_high << 32 | packet.ts_low for packet in packets] == [WALL_NS] * 5 + [WALL_NS + 1, WALL_NS]
    assert option(packets[0], 2) == b"\1\0\0\0"  # inbound
    assert option(packets[5], 2) == b"\2\0\0\0"  # outbound
    assert option(packets[6], 1) == b"drop: ipv4_header"
    assert capture.frames == 7


def test_dpkts_own_reader_takes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    capture = Capture(path)
    frames = frames_of_all_sorts()
    for frame in frames:
        capture.frame(capture.add_link("a"), frame, to_guest=True, wall_ns=WALL_NS)
    capture.close()
    with path.open("rb") as file:
        read = list(dpkt.pcapng.Reader(file))
    assert [data for _, data in read] == frames
    assert read[0][0] == pytest.approx(WALL_NS / 1e9)


@pytest.mark.needs("tshark")
def test_tshark_finds_nothing_malformed(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    capture = Capture(path)
    frames = frames_of_all_sorts()
    for number, frame in enumerate(frames):
        # Out of order and late, as links are: the second is described when frames of the first are there already.
        link = capture.add_link(f"link{number % 2}")
        capture.frame(link, [frame[:14], frame[14:]], to_guest=bool(number % 2), wall_ns=WALL_NS + number)
    capture.frame(0, frames[1], to_guest=False, comment="drop: not_its_address ä", wall_ns=WALL_NS + 9)
    capture.close()
    fields = ("frame.len", "frame.interface_name", "frame.packet_flags_direction", "frame.comment", "_ws.malformed")
    shown = subprocess.run(
        ["tshark", "-n", "-r", path, "-T", "json", *(word for field in fields for word in ("-e", field))],
        check=True,
        capture_output=True,
    )
    layers = [packet["_source"]["layers"] for packet in json.loads(shown.stdout)]
    assert [int(layer["frame.len"][0]) for layer in layers] == [*map(len, frames), len(frames[1])]
    assert [layer["frame.interface_name"] for layer in layers[:3]] == [["link0"], ["link1"], ["link0"]]
    assert [int(layer["frame.packet_flags_direction"][0], 16) for layer in layers[:2]] == [1, 2]
    assert layers[-1]["frame.comment"] == ["drop: not_its_address ä"]
    assert not any("_ws.malformed" in layer for layer in layers)
    info = subprocess.run(["capinfos", "-T", "-r", "-a", "-S", path], check=True, capture_output=True, text=True)
    assert f"{WALL_NS // 10**9}.{WALL_NS % 10**9:09d}" in info.stdout


def test_the_file_is_its_owners_only_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    path.write_bytes(b"x" * 100_000)
    path.unlink()
    Capture(path).close()
    assert path.stat().st_mode & 0o777 == 0o600
    size = path.stat().st_size
    path.write_bytes(b"x" * 100_000)
    Capture(path).close()
    assert path.stat().st_size == size


def test_frames_reach_the_file_in_lumps_and_at_the_latest_after_a_second(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "a.pcapng"
    capture = Capture(path)
    link = capture.add_link("a")
    capture.frame(link, bytes(1000), to_guest=True)
    assert path.stat().st_size == 0
    capture.frame(link, bytes(FLUSH_BYTES), to_guest=True)
    assert path.stat().st_size > FLUSH_BYTES
    before = path.stat().st_size
    capture.frame(link, bytes(1000), to_guest=True)
    assert path.stat().st_size == before

    async def wait() -> None:
        with trio.move_on_after(1.5):
            await capture.run()

    trio.run(wait, clock=autojump_clock)
    assert path.stat().st_size > before
    capture.close()


def test_a_full_disk_ends_the_capture_with_one_warning() -> None:
    warnings: list[str] = []
    capture = Capture("/dev/full", on_warning=warnings.append)
    link = capture.add_link("a")
    for _ in range(1000):
        capture.frame(link, bytes(1500), to_guest=True)
    capture.flush()
    capture.close()
    assert warnings == ["/dev/full: No space left on device: the capture ends here, the network goes on"]


def test_a_write_that_fails_half_way_leaves_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pcapng"
    warnings: list[str] = []
    capture = Capture(path, on_warning=warnings.append)
    link = capture.add_link("a")
    capture.frame(link, b"first", to_guest=True)
    capture.flush()
    capture.frame(link, b"second" * 1000, to_guest=True)
    write, calls = os.write, iter([100])

    def short_write(fd: int, data: memoryview) -> int:
        for length in calls:
            return write(fd, data[:length])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("netstack.host.capture.os.write", short_write)
    capture.flush()
    monkeypatch.undo()
    assert len(warnings) == 1
    assert [block.pkt_data for block in blocks(path)[2:]] == [b"first"]


def test_a_limit_ends_the_capture_below_it(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    warnings: list[str] = []
    capture = Capture(path, max_size=200_000, on_warning=warnings.append)
    link = capture.add_link("a")
    for _ in range(500):
        capture.frame(link, bytes(1500), to_guest=True)
    capture.close()
    assert 100_000 < path.stat().st_size <= 200_000
    assert warnings == [f"{path} has reached its limit of 200000 bytes: the capture ends here"]
    assert len(blocks(path)) > 60


def test_a_fifo_is_written_as_fast_as_it_is_read_and_never_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    warnings: list[str] = []
    capture = Capture(path, on_warning=warnings.append)
    link = capture.add_link("x")
    frame, got = bytes(1500), b""
    try:
        for _ in range(2000):  # 3 MB: more than a pipe holds, and less than the reader may be behind
            capture.frame(link, frame, to_guest=True)
        while capture.size > len(got):
            with contextlib.suppress(BlockingIOError):
                got += os.read(reader, 1 << 20)
            capture.flush()
        (tmp_path / "copy").write_bytes(got)
        assert len(blocks(tmp_path / "copy")) == 2002
        for _ in range(10_000):
            capture.frame(link, frame, to_guest=True)
    finally:
        os.close(reader)
    assert not capture.is_open
    assert warnings == [f"{path}: who reads it is too slow: the capture ends here, the network goes on"]


def test_a_file_that_was_there_becomes_its_owners_only(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    path.write_bytes(b"x" * 1000)
    path.chmod(0o666)
    Capture(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size < 1000


def test_what_cannot_be_opened_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Capture(tmp_path / "gone" / "a.pcapng")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device or address"):
        Capture(tmp_path / "fifo")  # and does not wait for a reader
