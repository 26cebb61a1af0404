"""`netstack pcap show`: files of both formats and byte orders, drops, and files that are damaged."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether

from netstack.cli import main
from netstack.cli.capture_file import CapturedFrame, CaptureError, read_capture
from netstack.host.capture import Capture

WALL_NS = 1_795_180_763_123_456_789
ETHER = Ether(src="52:54:00:12:34:56", dst="52:55:c0:a8:05:02")
FRAMES = [
    bytes(ETHER / ARP(psrc="192.168.5.15", pdst="192.168.5.2")),
    bytes(ETHER / IP(src="192.168.5.15", dst="192.168.5.3") / UDP(sport=999) / DNS(qd=DNSQR(qname="a.test"))),
    bytes(ETHER / IPv6(src="fd00:c0a8:5::15", dst="fd00:c0a8:5::2") / TCP(sport=1000, dport=80)),
]


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "a.pcapng"
    capture = Capture(path)
    first, second = capture.add_link("unix:///a"), capture.add_link("b")
    for number, frame in enumerate(FRAMES):
        capture.frame(first, frame, to_guest=number == 1, wall_ns=WALL_NS + number)
    capture.frame(second, FRAMES[1][:30], to_guest=False, comment="drop: ipv4_header", wall_ns=WALL_NS + 3)
    capture.close()
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["pcap", "show", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_one_line_a_frame(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, str(sample))
    assert len(lines) == 4
    assert lines[0].split()[0] == "1"
    assert lines[0].split()[1].endswith(".123456789")
    assert "unix:///a from guest 42 bytes: ARP who has 192.168.5.2" in lines[0]
    assert "unix:///a to guest" in lines[1]
    assert "192.168.5.15 > 192.168.5.3 UDP / DNS Qry" in lines[1]
    assert "TCP fd00:c0a8:5::15:1000 > fd00:c0a8:5::2:http S" in lines[2]
    assert lines[3].endswith("[drop: ipv4_header]")
    assert " b from guest 30 bytes: " in lines[3]


def test_limit_and_drops(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(shown(capsys, str(sample), "--limit", "2")) == 2
    (line,) = shown(capsys, str(sample), "--drops")
    assert line.startswith("4 ")


def test_verbose_shows_the_fields(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "-v", "--limit", "2", str(sample))
    assert "    ###[ ARP ]###" in lines
    assert any("qname" in line and "a.test" in line for line in lines)


def test_json(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [json.loads(line) for line in shown(capsys, "--json", str(sample))]
    assert [frame["to_guest"] for frame in frames] == [False, True, False, False]
    assert [frame["dropped"] for frame in frames] == [None, None, None, "ipv4_header"]
    assert [frame["time_ns"] for frame in frames] == [WALL_NS + n for n in range(4)]
    assert frames[1]["layers"] == ["Ether", "IP", "UDP", "DNS"]
    assert (frames[3]["number"], frames[3]["link"], frames[3]["length"]) == (4, "b", 30)


def test_other_peoples_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.pcap"
    with old.open("wb") as file:
        writer = dpkt.pcap.Writer(file, snaplen=20, nano=True)
        writer.writepkt(FRAMES[0][:20], 12.000000034)
    (line,) = shown(capsys, str(old))
    assert ".000000034 20 bytes: " in line
    raw = tmp_path / "raw.pcap"
    with raw.open("wb") as file:
        dpkt.pcap.Writer(file, linktype=101).writepkt(FRAMES[1][14:], 1.0)  # LINKTYPE_RAW: IP without Ethernet
    assert "192.168.5.15 > 192.168.5.3 UDP / DNS" in shown(capsys, str(raw))[0]
    unknown = tmp_path / "unknown.pcap"
    with unknown.open("wb") as file:
        dpkt.pcap.Writer(file, linktype=9999).writepkt(b"whatever", 1.0)
    assert "8 bytes: Raw" in shown(capsys, str(unknown))[0]


@pytest.mark.needs("tshark")
def test_wiresharks_own_pcapng(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.pcapng"
    subprocess.run(["tshark", "-r", sample, "-w", copy, "-F", "pcapng"], check=True, capture_output=True)
    frames = [json.loads(line) for line in shown(capsys, "--json", str(copy))]
    assert [frame["comment"] for frame in frames] == [None, None, None, "drop: ipv4_header"]
    assert frames[0]["time_ns"] == WALL_NS


@pytest.mark.parametrize("order", "<>")
def test_both_byte_orders_and_units_of_time(order: str) -> None:
    def block(kind: int, body: bytes) -> bytes:
        length = 12 + len(body)
        return struct.pack(order + "II", kind, length) + body + struct.pack(order + "I", length)

    section = block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))
    micro = block(1, struct.pack(order + "HHI", 1, 0, 0))
    binary = block(1, struct.pack(order + "HHI", 1, 0, 0) + struct.pack(order + "HHB3x", 9, 1, 0x80 | 10))
    unknown = block(0xBAD, bytes(8))
    packet = block(6, struct.pack(order + "5I", 1, 0, 1536, 3, 99) + b"abc\0")
    simple = block(3, struct.pack(order + "I", 2) + b"xy\0\0")
    first, second, *rest = read_frames(section + micro + binary + unknown + packet + simple)
    assert (first.data, first.length, first.wall_ns) == (b"abc", 99, 1_500_000_000)
    assert (second.data, second.length) == (b"xy", 2)
    assert rest == []
    # A new section forgets the interfaces of the one before.
    with pytest.raises(CaptureError, match="too short for what it should hold"):
        read_frames(section + micro + binary + section + micro + packet)


def read_frames(data: bytes) -> list[CapturedFrame]:
    return list(read_capture(io.BytesIO(data)))


@pytest.mark.parametrize("cut", (1, 3, 5, 11, 20, 50))
def test_a_file_that_ends_early_shows_what_it_has(
    cut: int, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.pcapng"
    damaged.write_bytes(sample.read_bytes()[:-cut])
    assert main(["pcap", "show", str(damaged)]) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err.startswith(f"netstack: {damaged}: the file ends inside the block at byte ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "words"),
    (
        (b"", "the file is empty"),
        (b"\x7fELF" + bytes(100), "not a pcap or pcapng file"),
        (b"\n\r\r\n", "the file ends inside the block at byte 0"),
        (b"\n\r\r\n" + bytes(8), "no byte order in the section header"),
        (b"\n\r\r\n\x0c\0\0\0M<+\x1a", "a section header of 12 bytes"),
        (b"\n\r\r\n\xff\xff\xff\xffM<+\x1a" + bytes(50), "a block of 4294967295 bytes at byte 0"),
        (b"\xd4\xc3\xb2\xa1" + bytes(3), "the file ends inside the block"),
        (b"\xd4\xc3\xb2\xa1" + bytes(20) + b"\xff" * 16, "a frame of 4294967295 bytes at byte 24"),
        (b"\xd4\xc3\xb2\xa1" + bytes(20) + bytes(9), "the file ends inside a frame at byte 24"),
    ),
)
def test_damage_is_one_line(data: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(data)
    assert main(["pcap", "show", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


@given(st.data())
def test_no_file_is_too_odd(data: st.DataObject) -> None:
    """Random bytes, and real files with some bytes changed: frames come out, or CaptureError, and nothing else."""
    whole = bytearray(_SAMPLE)
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    tail = data.draw(st.binary(max_size=64))
    with contextlib.suppress(CaptureError):
        for frame in read_frames(bytes(whole) + tail):
            assert len(frame.data) <= len(whole) + len(tail)


def _sample_bytes() -> bytes:
    def option(code: int, value: bytes) -> bytes:
        return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)

    def block(kind: int, body: bytes) -> bytes:
        return struct.pack("<II", kind, 12 + len(body)) + body + struct.pack("<I", 12 + len(body))

    interface = struct.pack("<HHI", 1, 0, 0) + option(2, b"a") + option(9, b"\x09") + bytes(4)
    packet = struct.pack("<5I", 0, 1, 2, 5, 5) + b"hello\0\0\0" + option(1, b"drop: x") + option(2, b"\1\0\0\0")
    section = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    return section + block(1, interface) + block(6, packet) + block(3, struct.pack("<I", 3) + b"abc\0")


_SAMPLE = _sample_bytes()


@given(frame=st.binary(max_size=80))
def test_no_frame_is_too_odd(frame: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.pcapng"
    capture = Capture(path)
    capture.frame(capture.add_link("a"), frame, to_guest=True)
    capture.close()
    assert main(["pcap", "show", "-v", str(path)]) == 0


def test_names_in_a_file_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pcapng"
    capture = Capture(path)
    link = capture.add_link("a\x1b[2J")
    capture.frame(link, b"x", to_guest=True, comment="drop: \x1b]0;title\x07")
    capture.close()
    assert "\x1b" not in "".join(shown(capsys, "-v", str(path)))


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    capture = Capture(path)
    for _ in range(2000):
        capture.frame(capture.add_link("a"), FRAMES[0], to_guest=True)
    capture.close()
    command = [sys.executable, "-m", "netstack", "pcap", "show", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
