"""UDP forwards between fakes: callers on the one side, frames of a guest on the other, a clock in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from netstack.core.addresses import link_local
from netstack.core.flows import Limits
from netstack.core.forwards import FIRST_PORT
from netstack.core.ports import READABLE, Caller, DatagramSocket, SocketError
from netstack.core.udp import IDLE
from netstack.core.udp_callers import IDLE_UNANSWERED, UdpPort
from netstack.core.udp_endpoint import write_packet
from netstack.core.udp_forwards import UdpForward
from netstack.wire.icmp import HOST_UNREACHABLE, PORT_UNREACHABLE, Problem, write_error
from tests.core.ip_fakes import FakeDatagramSocket, addresses
from tests.fakes import FakeLink
from tests.world import GATEWAY4, GATEWAY6, GUEST4, GUEST6, GUEST_MAC, OTHER_MAC, WORLD4, WORLD6, World

LOOPBACK4 = bytes((127, 0, 0, 1))
LOOPBACK6 = bytes(15) + b"\1"
OTHER_GUEST4 = GUEST4[:3] + b"\x10"
LINK_LOCAL6 = link_local(GUEST_MAC)
GATEWAY_LINK_LOCAL6 = addresses().link_local
PORT = 7000
HOST_PORT = 9000


class FakeListener:
    """A bound socket of the host whose callers are the test."""

    batches = False

    def __init__(self, fd: int, address: bytes = LOOPBACK4) -> None:
        self.fd = fd
        self.address = address
        self.port = HOST_PORT
        self.incoming: deque[tuple[bytes, Caller] | OSError] = deque()
        self.errors: deque[SocketError] = deque()
        self.replies: dict[Caller, FakeDatagramSocket] = {}
        self.refused: list[Caller] = []
        self.closed = False

    def fileno(self) -> int:
        assert not self.closed
        return self.fd

    def close(self) -> None:
        assert not self.closed
        self.closed = True

    def receive_caller(self, buffer: memoryview) -> tuple[int, int, Caller]:
        if not self.incoming:
            raise BlockingIOError
        item = self.incoming.popleft()
        if isinstance(item, OSError):
            raise item
        payload, caller = item
        buffer[: len(payload)] = payload
        return len(payload), len(payload), caller

    def receive_callers(self, buffer: memoryview, take: Callable[[int, int, Caller], None]) -> int:
        raise NotImplementedError

    def receive_error(self) -> SocketError | None:
        return self.errors.popleft() if self.errors else None

    def reply_socket(self, caller: Caller) -> DatagramSocket:
        self.replies[caller] = FakeDatagramSocket(self.fd)
        return self.replies[caller]

    def refuse(self, caller: Caller) -> bool:
        self.refused.append(caller)
        return True


class Bench(World):
    """A stack with one forward to a guest's port."""

    def __init__(self, *, limits: Limits | None = None, as_gateway: bool = False, address: bytes = LOOPBACK4) -> None:
        super().__init__(limits=limits)
        self.link = self.add_link()
        self.guest: bytes | None = GUEST4
        self.forward = UdpForward(self.stack.udp_forwards, lambda family, now: self.guest, as_gateway=as_gateway)
        self.sock, self.port = self.open(self.forward, address)
        self.forward.start()
        self.arrive(GUEST4)

    def open(self, forward: UdpForward, address: bytes = LOOPBACK4) -> tuple[FakeListener, UdpPort]:
        sock = FakeListener(5000 + len(self.poller.handlers), address)
        return sock, forward.add(sock, PORT)

    def arrive(self, address: bytes, mac: bytes = GUEST_MAC, link: FakeLink | None = None) -> None:
        """A guest with this address is on the link."""
        on = link or self.link
        self.stack.switch.learn(mac, on, self.now)
        self.stack.neighbors.learn(on, mac, address, self.now)

    def call(self, caller: Caller, *payloads: bytes) -> list[bytes]:
        """Datagrams of a caller; the packets that the guest gets."""
        self.sock.incoming.extend((payload, caller) for payload in payloads)
        return self.serve()

    def serve(self) -> list[bytes]:
        for _ in range(100):
            if not self.sock.incoming or not self.poller.events[self.sock.fd] & READABLE:
                break
            self.port.on_ready(READABLE, self.now)
        self.stack.end_round(self.now)
        return [frame[14:] for frame in self.take(self.link)]

    def answer(self, packet: bytes, payload: bytes, *, ttl: int = 64, link: FakeLink | None = None) -> None:
        """The guest sends this back to whoever sent the packet."""
        ipv4 = packet[0] >> 4 == 4
        src, dst = (packet[12:16], packet[16:20]) if ipv4 else (packet[8:24], packet[24:40])
        at = 20 if ipv4 else 40
        ports = int.from_bytes(packet[at : at + 2], "big"), int.from_bytes(packet[at + 2 : at + 4], "big")
        back = write_packet(dst, ports[1], src, ports[0], payload, ttl)
        self.send(back, link=link)

    def send(self, packet: bytes, *, link: FakeLink | None = None, mac: bytes = GUEST_MAC) -> None:
        kind = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
        self.receive(link or self.link, self.mac + mac + kind + packet)

    def sent(self, caller: Caller) -> list[bytes]:
        """What was sent back to this caller."""
        return [sent.payload for sent in self.sock.replies[caller].sent]


def source(packet: bytes) -> tuple[bytes, int]:
    if packet[0] >> 4 == 4:
        return packet[12:16], int.from_bytes(packet[20:22], "big")
    return packet[8:24], int.from_bytes(packet[40:42], "big")


def someone(number: int = 0, address: bytes = WORLD4) -> Caller:
    return address, 40000 + number, b"", 0


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("caller", "guest", "seen"),
    (
        (WORLD4, GUEST4, WORLD4),
        (LOOPBACK4, GUEST4, GATEWAY4),
        (OTHER_GUEST4, GUEST4, GATEWAY4),
        (b"\xa9\xfe\1\1", GUEST4, GATEWAY4),
        (WORLD6, GUEST4, GATEWAY4),
        (WORLD6, GUEST6, WORLD6),
        (LOOPBACK6, GUEST6, GATEWAY6),
        (bytes.fromhex("fe80") + bytes(13) + b"\7", GUEST6, GATEWAY6),
        (WORLD4, GUEST6, GATEWAY6),
        (WORLD6, LINK_LOCAL6, GATEWAY_LINK_LOCAL6),  # from there it answers to its own wire alone
        (LOOPBACK6, LINK_LOCAL6, GATEWAY_LINK_LOCAL6),
    ),
)
def test_the_guest_sees_a_caller_that_it_can_answer_and_else_the_gateway(
    caller: bytes, guest: bytes, seen: bytes
) -> None:
    bench = Bench()
    bench.guest = guest
    bench.arrive(guest)
    who = someone(address=caller)
    [packet] = bench.call(who, b"hello")
    assert source(packet) == (seen, 40000)
    for text in (b"first", b"second"):  # on the slow road, and on the fast one
        bench.answer(packet, text)
    assert bench.sent(who) == [b"first", b"second"]


def test_the_second_answer_takes_the_fast_path(bench: Bench) -> None:
    [packet] = bench.call(someone(), b"hello")
    bench.answer(packet, b"1" * 20)  # with less it is a frame that Ethernet would have padded
    slow = bench.stack.counters.frames_slow
    bench.answer(packet, b"2" * 20)
    assert bench.stack.counters.frames_slow == slow


def test_callers_may_be_shown_as_the_gateway() -> None:
    bench = Bench(as_gateway=True)
    [packet] = bench.call(someone(), b"hello")
    assert source(packet) == (GATEWAY4, 40000)


def test_one_that_looks_like_another_gets_another_port(bench: Bench) -> None:
    alike = [(LOOPBACK4[:3] + bytes([last]), 40000, b"", 0) for last in (1, 2, 3)]
    ports = [source(bench.call(caller, b"x")[0])[1] for caller in alike]
    assert ports == [40000, FIRST_PORT + 1, FIRST_PORT + 2]
    again = [source(bench.call(caller, b"x")[0])[1] for caller in alike]
    assert again == ports


def test_one_caller_that_calls_two_of_our_addresses_is_answered_from_both(bench: Bench) -> None:
    callers = [(WORLD4, 40000, bytes((198, 51, 100, last)), 0) for last in (1, 2)]
    for caller in callers:
        [packet] = bench.call(caller, b"x")
        bench.answer(packet, caller[2])
    assert [bench.sent(caller) for caller in callers] == [[callers[0][2]], [callers[1][2]]]


def test_port_zero_is_nobodys(bench: Bench) -> None:
    [packet] = bench.call((WORLD4, 0, b"", 0), b"x")
    assert source(packet)[1] != 0


def test_datagrams_of_one_size_are_a_run_and_all_of_them_arrive(bench: Bench) -> None:
    payloads = [bytes([i]) * 100 for i in range(40)] + [b"short", b"", b"a" * 100, b"b" * 101]
    packets = bench.call(someone(), *payloads)
    assert [packet[28:] for packet in packets if len(packet) > 46] == [p for p in payloads if len(p) > 18]
    assert len(packets) == len(payloads)
    assert bench.forward.traffic().bytes_to_guest == sum(map(len, payloads))


def test_a_large_datagram_is_cut_to_what_the_guest_takes(bench: Bench) -> None:
    packets = bench.call(someone(), b"x" * 4000)
    assert len(packets) == 3
    assert max(map(len, packets)) <= 1500


class TestWhoIsCalled:
    def test_a_guest_that_is_not_there_yet_is_asked_for_and_its_datagrams_wait_in_the_kernel(self) -> None:
        bench = Bench()
        bench.guest = OTHER_GUEST4
        [request] = bench.call(someone(), b"1", b"2")
        assert request[24:28] == OTHER_GUEST4  # ARP
        assert not bench.poller.events[bench.sock.fd] & READABLE
        assert len(bench.sock.incoming) == 2
        bench.arrive(OTHER_GUEST4)
        assert [packet[16:20] for packet in bench.serve()] == [OTHER_GUEST4, OTHER_GUEST4]

    def test_when_nobody_answers_they_are_dropped_and_the_next_ones_ask_again(self, bench: Bench) -> None:
        bench.guest = OTHER_GUEST4
        bench.call(someone(), *[b"a guest that comes in a minute does not want to know"] * 1000)
        bench.advance(bench.now + 10.0)
        assert bench.drops["udp_forward_no_guest"] == 1000
        assert bench.forward.traffic().last_error == "nobody answers at 192.168.5.16"
        bench.take(bench.link)
        assert len(bench.call(someone(), b"3")) == 1

    def test_without_a_guest_of_that_name_they_are_dropped_at_once(self, bench: Bench) -> None:
        bench.guest = None
        assert bench.call(someone(), b"1", b"2") == []
        assert bench.drops["udp_forward_no_guest"] == 2
        assert bench.forward.traffic().refused == 2
        bench.guest = GUEST4
        assert len(bench.call(someone(), b"3")) == 1

    def test_a_guest_that_got_another_address_is_followed_within_a_second(self, bench: Bench) -> None:
        bench.call(someone(), b"1")
        bench.guest = OTHER_GUEST4
        bench.arrive(OTHER_GUEST4)
        bench.advance(bench.now + 1.5)
        [packet] = bench.call(someone(), b"2")
        assert packet[16:20] == OTHER_GUEST4
        assert len(bench.stack.udp_forwards) == 1

    def test_a_guest_that_moved_to_another_link_is_followed(self, bench: Bench) -> None:
        [packet] = bench.call(someone(), b"1")
        bench.answer(packet, b"one")
        other = bench.add_link("other")
        bench.advance(bench.now + 100.0)  # or the switch would not believe it
        bench.arrive(GUEST4, link=other)
        assert bench.call(someone(), b"2") == []
        [frame] = bench.take(other)
        assert frame[:6] == GUEST_MAC
        bench.answer(packet, b"two", link=other)
        assert bench.sent(someone()) == [b"one", b"two"]

    def test_the_flows_of_a_lost_link_end_and_callers_find_the_guest_where_it_is_next(self, bench: Bench) -> None:
        bench.call(someone(), b"1")
        bench.remove_link(bench.link)
        assert len(bench.stack.udp_forwards) == 0
        bench.link = bench.add_link("again")
        bench.arrive(GUEST4, OTHER_MAC)
        [packet] = bench.call(someone(), b"2")
        assert source(packet) == (WORLD4, 40000)

    def test_while_its_link_is_congested_nothing_is_received(self, bench: Bench) -> None:
        bench.call(someone(), b"1")
        bench.link.congested = True
        assert bench.call(someone(), b"2") == []
        assert len(bench.sock.incoming) == 1
        bench.link.congested = False
        bench.link.drain(bench.now)
        assert len(bench.serve()) == 1

    def test_a_congested_link_that_is_lost_does_not_stop_it(self, bench: Bench) -> None:
        bench.link.congested = True
        bench.call(someone(), b"2")
        bench.remove_link(bench.link)
        bench.link = bench.add_link("again")
        bench.arrive(GUEST4)
        assert len(bench.serve()) == 1

    def test_nor_does_one_that_the_guest_has_left(self, bench: Bench) -> None:
        [packet] = bench.call(someone(), b"hello")
        bench.link.congested = True
        assert bench.call(someone(), b"one more, and long enough") == []
        bench.now += 1000.0
        there = bench.add_link("there")
        bench.answer(packet, b"here I am", link=there)
        assert bench.sent(someone()) == [b"here I am"]
        bench.serve()
        assert [frame[42:] for frame in bench.take(there)] == [b"one more, and long enough"]


class TestWhoAnswers:
    def test_a_guest_that_asked_the_same_peer_before_answers_through_the_port_that_was_called(
        self, bench: Bench
    ) -> None:
        question = write_packet(GUEST4, PORT, WORLD4, 40000, b"question", 64)
        bench.send(question)
        bench.send(question)
        [own] = bench.host.datagrams
        [packet] = bench.call(someone(), b"call")
        bench.answer(packet, b"answer")
        assert bench.sent(someone()) == [b"answer"]
        assert len(own.sent) == 2
        assert len(bench.stack.udp) == 1

    def test_another_guest_that_pretends_to_be_the_one_is_not_heard(self, bench: Bench) -> None:
        bench.arrive(OTHER_GUEST4, OTHER_MAC)
        [packet] = bench.call(someone(), b"call")
        bench.answer(packet, b"right")
        bench.send(write_packet(GUEST4, PORT, WORLD4, 40000, b"wrong", 64), mac=OTHER_MAC)
        assert bench.sent(someone()) == [b"right"]
        assert bench.drops["source_not_its_own"] == 1

    def test_a_caller_with_the_port_of_a_service_does_not_get_the_guests_queries(self, bench: Bench) -> None:
        bench.add_services()
        caller = (LOOPBACK4, 123, b"", 0)
        [packet] = bench.call(caller, b"x")
        assert source(packet)[1] != 123
        bench.send(write_packet(GUEST4, PORT, GATEWAY4, 123, bytes(48), 64))
        assert bench.sent(caller) == []

    @pytest.mark.parametrize("ttl", (1, 2, 64))
    def test_an_answer_to_the_gateway_has_arrived_whatever_its_ttl(self, bench: Bench, ttl: int) -> None:
        caller = someone(address=LOOPBACK4)
        [packet] = bench.call(caller, b"x")
        bench.answer(packet, b"y", ttl=ttl)
        assert bench.sent(caller) == [b"y"]

    def test_beyond_the_gateway_the_ttl_counts(self, bench: Bench) -> None:
        [packet] = bench.call(someone(), b"x")
        bench.answer(packet, b"y", ttl=1)
        assert bench.sent(someone()) == []
        assert bench.drops["udp_ttl_exceeded"] == 1


class TestErrors:
    def refuse(self, bench: Bench, packet: bytes, problem: Problem = PORT_UNREACHABLE) -> None:
        """The guest's kernel says that its port is closed."""
        error = write_error(packet[16:20], packet, problem)
        assert error is not None
        bench.send(error)

    def test_a_closed_port_of_the_guest_is_told_to_the_caller(self, bench: Bench) -> None:
        [packet] = bench.call(someone(), b"x")
        self.refuse(bench, packet)
        assert bench.sock.refused == [someone()]
        assert bench.forward.traffic().last_error == "192.168.5.15 refuses port 7000: nothing listens there"

    def test_but_not_more_often_than_bearable(self, bench: Bench) -> None:
        [packet] = bench.call(someone(), b"x")
        for _ in range(100):
            self.refuse(bench, packet)
        assert len(bench.sock.refused) == 1
        bench.advance(bench.now + 1.0)
        self.refuse(bench, packet)
        assert len(bench.sock.refused) == 2

    def test_nothing_else_that_a_guest_complains_about_is(self, bench: Bench) -> None:
        [packet] = bench.call(someone(), b"x")
        self.refuse(bench, packet, HOST_UNREACHABLE)
        stranger = write_packet(WORLD4, 40001, GUEST4, PORT, b"never sent", 64)
        self.refuse(bench, stranger)
        assert bench.sock.refused == []
        assert bench.drops["icmp_error_from_guest"] == 2

    def test_that_the_caller_is_gone_is_told_to_the_guest(self, bench: Bench) -> None:
        caller = someone(address=LOOPBACK4)
        [packet] = bench.call(caller, b"x")
        bench.answer(packet, b"y")
        bench.sock.errors.append(SocketError(111, LOOPBACK4, 40000, LOOPBACK4, 3, 3, 0, b"y"))
        bench.port.on_ready(8, bench.now)
        bench.stack.end_round(bench.now)
        [frame] = bench.take(bench.link)
        assert (frame[34], frame[35]) == (3, 3)
        assert frame[26:30] == GATEWAY4

    def test_in_the_words_by_which_the_guest_knows_the_caller(self, bench: Bench) -> None:
        bench.call(someone(address=LOOPBACK4), b"x")
        alike = someone(address=bytes((127, 0, 0, 2)))
        [packet] = bench.call(alike, b"x")
        bench.answer(packet, b"y" * 20)
        bench.sock.errors.append(SocketError(111, alike[0], alike[1], alike[0], 3, 3, 0, b"y" * 20))
        bench.port.on_ready(8, bench.now)
        bench.stack.end_round(bench.now)
        [frame] = bench.take(bench.link)
        quoted = frame[42:]
        assert (quoted[12:16], quoted[16:20]) == (GUEST4, GATEWAY4)
        assert int.from_bytes(quoted[22:24], "big") == source(packet)[1]

    def test_across_families_too(self, bench: Bench) -> None:
        caller = someone(address=LOOPBACK6)
        [packet] = bench.call(caller, b"x")
        bench.answer(packet, b"y")
        bench.sock.errors.append(SocketError(111, LOOPBACK6, 40000, LOOPBACK6, 1, 4, 0, b"y"))
        bench.port.on_ready(8, bench.now)
        bench.stack.end_round(bench.now)
        [frame] = bench.take(bench.link)
        assert (frame[34], frame[35]) == (3, 3)

    def test_an_error_that_is_anothers_does_not_stop_the_next_datagram(self, bench: Bench) -> None:
        bench.sock.incoming.append(ConnectionRefusedError(111, "of another caller"))
        assert len(bench.call(someone(), b"x")) == 1


class TestBounds:
    def test_a_caller_that_is_never_answered_is_forgotten_soon(self, bench: Bench) -> None:
        bench.call(someone(), b"x")
        bench.advance(bench.now + IDLE_UNANSWERED + 3.0)
        assert len(bench.stack.udp_forwards) == 0

    def test_one_that_is_answered_is_kept_for_two_minutes(self, bench: Bench) -> None:
        [packet] = bench.call(someone(), b"x")
        bench.answer(packet, b"y")
        bench.advance(bench.now + IDLE - 1.0)
        assert len(bench.stack.udp_forwards) == 1
        bench.advance(bench.now + 5.0)
        assert len(bench.stack.udp_forwards) == 0
        assert not bench.stack.udp.paths
        traffic = bench.forward.traffic()
        assert (traffic.open, traffic.total, traffic.bytes_to_guest, traffic.bytes_from_guest) == (0, 1, 1, 1)

    def test_strangers_do_not_put_out_those_that_are_talked_to(self) -> None:
        bench = Bench(limits=Limits(udp_flows_per_guest=10))
        [packet] = bench.call(someone(), b"x")
        bench.answer(packet, b"y")
        for number in range(1, 100):
            bench.call(someone(number), b"x")
        assert len(bench.stack.udp_forwards) == 10
        assert bench.drops["udp_forward_flow_evicted"] == 90
        bench.answer(packet, b"z")
        assert bench.sent(someone()) == [b"y", b"z"]

    def test_at_the_limit_of_all_the_largest_forward_loses_its_own(self) -> None:
        bench = Bench(limits=Limits(udp_flows=10))
        for number in range(9):
            bench.call(someone(number), b"x")
        small = UdpForward(bench.stack.udp_forwards, lambda family, now: GUEST4)
        sock, port = bench.open(small)
        small.start()
        for number in range(3):
            sock.incoming.append((b"x", someone(100 + number)))
            port.on_ready(READABLE, bench.now)
        assert (len(bench.forward), len(small)) == (7, 3)

    def test_closed_it_gives_everything_back(self, bench: Bench) -> None:
        [packet] = bench.call(someone(), b"x")
        bench.answer(packet, b"y")
        bench.call(someone(1), b"x")
        bench.forward.close(bench.now)
        assert bench.sock.closed
        assert bench.sock.fd not in bench.poller.handlers
        assert not bench.stack.udp_forwards.flows
        assert not bench.stack.udp_forwards.forwards
        assert not bench.stack.udp.paths
        # What the guest still sends there is now its own question to the world.
        bench.answer(packet, b"z")
        assert len(bench.stack.udp) == 1

    def test_a_forward_that_was_never_started_can_be_closed(self, bench: Bench) -> None:
        forward = UdpForward(bench.stack.udp_forwards, lambda family, now: GUEST4)
        sock, _ = bench.open(forward)
        forward.close(bench.now)
        assert sock.closed
