"""The time server: scapy asks and reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.ntp import NTPHeader

from netstack.core.sntp import SntpServer, to_timestamp

NOW = 1_763_640_000.25


def make_server(now: float = NOW) -> SntpServer:
    return SntpServer(lambda: now)


@pytest.mark.parametrize("version", (1, 2, 3, 4))
def test_a_request_is_answered(version: int) -> None:
    request = bytearray(bytes(NTPHeader(version=version, mode=3, poll=6)))
    request[40:48] = b"anything"
    payload = make_server().answer(bytes(request))
    assert payload is not None
    assert len(payload) == 48
    answer = NTPHeader(payload)
    assert (answer.leap, answer.version, answer.mode) == (0, version, 4)
    assert 1 <= answer.stratum <= 15
    assert answer.poll == 6
    assert answer.precision == -20
    assert answer.delay == 0
    assert 0 < answer.dispersion < 0.1
    assert payload[24:32] == b"anything"  # originate
    assert payload[32:40] == payload[40:48]
    # scapy gives the seconds since 1900.
    assert float(answer.sent) - 2208988800 == pytest.approx(NOW, abs=1e-3)
    assert 0 < float(answer.sent) - float(answer.ref) <= 64


def test_longer_requests_get_no_longer_answers() -> None:
    answer = make_server().answer(bytes(NTPHeader(version=4, mode=3)) + b"extension" * 100)
    assert answer is not None
    assert len(answer) == 48


@pytest.mark.parametrize("mode", (0, 1, 2, 4, 5, 6, 7))
def test_other_modes_are_dropped(mode: int) -> None:
    server = make_server()
    assert server.answer(bytes((4 << 3 | mode,)) + bytes(47)) is None
    assert server.counters == {"sntp_not_a_request": 1}


@pytest.mark.parametrize("version", (0, 5, 6, 7))
def test_unknown_versions_are_dropped(version: int) -> None:
    assert make_server().answer(bytes((version << 3 | 3,)) + bytes(47)) is None


def test_short_packets_are_dropped() -> None:
    server = make_server()
    for length in range(48):
        assert server.answer(bytes((0x23,) * length)) is None
    assert server.counters == {"sntp_malformed": 48}


@pytest.mark.parametrize(
    ("seconds", "timestamp"),
    (
        (0.0, 2208988800 << 32),
        (-2208988800.0, 0),
        (0.5, 2208988800 << 32 | 1 << 31),
        (2085978496.0, 0),  # RFC 5905 figure 4: 7 February 2036, the first era ends
        (2085978495.75, 0xFFFFFFFFC0000000),
        (4102444800.0, 2016466304 << 32),
    ),
)
def test_timestamps(seconds: float, timestamp: int) -> None:
    assert to_timestamp(seconds) == timestamp


@given(st.binary(max_size=100), st.floats(-1e10, 1e11))
def test_any_bytes_and_any_clock_are_survived(payload: bytes, now: float) -> None:
    answer = make_server(now).answer(payload)
    assert answer is None or len(answer) == 48
