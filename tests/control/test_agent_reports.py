"""What an agent's lines mean, and that nothing it says can do harm."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from netstack.control.agent import write_script
from netstack.control.agent.conversation import MAX_REPORT, SILENCE_SECONDS, TooMuchError, converse, parse_posted
from netstack.control.agent.reports import MAX_LISTENERS, Hello, parse_hello, parse_report
from netstack.control.auto_publish import Listener

LITTLE = Hello()


def read(*lines: str, hello: Hello = LITTLE) -> list[str]:
    return [f"{one.protocol} {one.address} {one.port}" for one in parse_report(lines, hello)]


@pytest.mark.parametrize(
    ("line", "expected"),
    (
        ("tcp 00000000:1F90", ["tcp 0.0.0.0 8080"]),
        ("tcp 0100007F:0016", ["tcp 127.0.0.1 22"]),
        ("udp 0F05A8C0:0035", ["udp 192.168.5.15 53"]),
        ("tcp6 00000000000000000000000000000000:0050", ["tcp :: 80"]),
        ("tcp6 00000000000000000000000001000000:0050", ["tcp ::1 80"]),
        ("tcp6 0000000000000000FFFF00000100007F:0050", ["tcp 127.0.0.1 80"]),
        ("tcp6 A8C000FD000005000000000015000000:0050", ["tcp fd00:c0a8:5::15 80"]),
        ("tcp 00000000:0000", []),
        ("tcp 00000000000000000000000000000000:0050", []),
        ("tcp 0000000g:0050", []),
        ("tcp 00000000:00500", []),
        ("sctp 00000000:0050", []),
        ("tcp", []),
        ("", []),
        # iptables-save, of Docker, of the CNI's portmap, of netavark, of kube-proxy
        (
            "iptables -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
            ["tcp 0.0.0.0 8080"],
        ),
        (
            "iptables -A DOCKER -d 127.0.0.1/32 ! -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 1.2.3.4",
            [],
        ),
        (
            "iptables -A CNI-DN-a1 -d 192.168.5.15/32 -p udp -m udp --dport 53 -j DNAT --to-destination 10.4.0.2:53",
            ["udp 192.168.5.15 53"],
        ),
        (
            'iptables -A X -p tcp -m comment --comment "--dport 9 -p udp" -m multiport --dports 80,443,90:91 -j DNAT',
            ["tcp 0.0.0.0 80", "tcp 0.0.0.0 443", "tcp 0.0.0.0 90", "tcp 0.0.0.0 91"],
        ),
        ('iptables -A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-X', ["tcp 0.0.0.0 30080"]),
        ("iptables -A OUTPUT -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1", []),
        ("iptables -A X -d 10.0.0.0/8 -p tcp --dport 80 -j DNAT --to-destination 10.0.0.1", []),
        ("iptables -A X ! -p tcp --dport 80 -j DNAT", []),
        ('iptables -A X -p tcp --dport 80 -m comment --comment "unfinished', []),
        ("iptables -A X -p tcp --dport 0 -j DNAT", []),
        ("iptables -A X -p tcp --dport", []),
        ("ip6tables -A X -p tcp -m tcp --dport 80 -j DNAT --to-destination [fd00::2]:80", ["tcp :: 80"]),
        ("nft \t\ttcp dport 8080 dnat ip to 10.88.0.2:80", ["tcp 0.0.0.0 8080"]),
        ("nft ip daddr 192.168.5.15 udp dport { 53, 5353 } dnat to 10.88.0.2",
         ["udp 192.168.5.15 53", "udp 192.168.5.15 5353"]),
        ("nft ip daddr != 127.0.0.0/8 tcp dport 8000-8002 dnat to 10.88.0.2",
         ["tcp 0.0.0.0 8000", "tcp 0.0.0.0 8001", "tcp 0.0.0.0 8002"]),
        ("nft ip6 daddr fd00::1 tcp dport 80 dnat ip6 to [fd00::2]:80", ["tcp fd00::1 80"]),
        ("nft tcp dport 99999 dnat to 10.88.0.2", []),
    ),
)  # fmt: skip
def test_a_line_says_which_ports_listen(line: str, expected: list[str]) -> None:
    assert read(line) == expected


def test_big_endian_kernels_write_addresses_the_other_way_round() -> None:
    hello = parse_hello("hello 1 b 32768 60999")
    assert hello == Hello(big_endian=True)
    assert read("tcp 7F000001:0050", hello=hello) == ["tcp 127.0.0.1 80"]


def test_the_ephemeral_ports_are_the_guests_own() -> None:
    assert parse_hello("hello 1 l 10000 20000") == Hello(ephemeral=(10000, 20000))
    assert parse_hello("hello 1 l 20000 10000") == Hello()
    assert parse_hello("hello 1 l") == Hello()


@pytest.mark.parametrize("line", ("", "hello", "hello 2 l", "hi 1 l", "GET / HTTP/1.1"))
def test_an_agent_of_another_language_is_told_from_ours(line: str) -> None:
    assert parse_hello(line) is None


def test_a_list_has_an_end_whatever_it_says() -> None:
    ranges = [f"nft tcp dport {first}-{first + 4999} dnat to 10.0.0.1" for first in range(1, 60000, 5000)]
    assert len(read(*ranges)) == MAX_LISTENERS


@given(st.lists(st.text(max_size=200) | st.from_regex(r"(tcp|udp6|nft|iptables) [ -~]{0,80}"), max_size=20))
def test_no_report_raises(lines: list[str]) -> None:
    for found in parse_report(lines, LITTLE):
        assert 1 <= found.port <= 65535


@given(st.binary(max_size=500))
def test_no_posted_report_raises(body: bytes) -> None:
    parse_posted(body)
    parse_posted(b"hello 1 l 1 2\n" + body)


def test_the_script_names_the_address_by_which_the_guest_asked() -> None:
    assert b"gateway=192.168.5.2\nhost=192.168.5.2\n" in write_script(ip_address("192.168.5.2").packed)
    assert b"gateway=fd00::2\nhost=[fd00::2]\n" in write_script(ip_address("fd00::2").packed)
    assert b"@" not in write_script(ip_address("192.168.5.2").packed).replace(b'"$@"', b"")


class Agent:
    """The agent's end of a conversation."""

    def __init__(self) -> None:
        self.to_gateway, self._from_agent = trio.open_memory_channel[bytes](100)
        self.scans = 0
        self.said = b""
        self.reports: list[list[Listener]] = []
        self.signs: list[bool] = []
        self.answer: bytes | None = b"=\n"

    async def receive(self) -> bytes:
        try:
            return await self._from_agent.receive()
        except trio.EndOfChannel:
            return b""

    async def send(self, data: bytes) -> None:
        self.said += data
        if data == b"scan\n":
            self.scans += 1
            if self.answer is not None:
                await self.to_gateway.send(self.answer)

    async def talk(self) -> None:
        await converse(self, lambda listeners, hello: self.reports.append(listeners), self.signs.append)


async def test_the_gateway_asks_and_a_list_is_reported_once(autojump_clock: Any, nursery: trio.Nursery) -> None:
    agent = Agent()
    agent.answer = b"tcp 00000000:0050\n.\n"
    nursery.start_soon(agent.talk)
    await agent.to_gateway.send(b"hello 1 l 32768 60999\n")
    await trio.sleep(0.01)
    assert agent.reports == [[Listener("tcp", ip_address("0.0.0.0"), 80)]]
    agent.answer = b"=\n"
    await trio.sleep(1)
    assert len(agent.reports) == 1
    assert agent.scans >= 6
    nursery.cancel_scope.cancel()


async def test_silence_is_noticed_in_time_and_so_is_its_end(autojump_clock: Any, nursery: trio.Nursery) -> None:
    agent = Agent()
    nursery.start_soon(agent.talk)
    await agent.to_gateway.send(b"hello 1 l 32768 60999\n")
    await trio.sleep(1)
    assert set(agent.signs) == {True}
    agent.answer = None
    await trio.sleep(0.2 + SILENCE_SECONDS)
    assert agent.signs[-1] is False
    scans = agent.scans
    await trio.sleep(5)
    assert agent.scans == scans  # nothing is piled up for a guest that is paused
    agent.answer = b"=\n"
    await agent.to_gateway.send(b"tcp 00000000:")
    await agent.to_gateway.send(b"0050\n.\n")
    await trio.sleep(0.1)
    assert agent.signs[-1] is True
    assert len(agent.reports) == 1
    nursery.cancel_scope.cancel()


async def test_an_agent_of_another_version_is_told_to_stop() -> None:
    agent = Agent()
    await agent.to_gateway.send(b"hello 7 l\n")
    await agent.talk()
    assert agent.said.startswith(b"stop ")


@pytest.mark.parametrize("flood", (b"x" * 5000, b"x\n" * MAX_REPORT))
async def test_an_agent_without_end_is_left(flood: bytes) -> None:
    agent = Agent()
    agent.answer = None
    await agent.to_gateway.send(b"hello 1 l\n")
    await agent.to_gateway.send(flood)
    with pytest.raises(TooMuchError), trio.fail_after(5):
        await agent.talk()
