"""TCP tests as dialogues: what the guest sends, what it must receive, and when.

    talk = established()
    talk.host.sends(b"hello")
    talk.settle()
    talk.expect(seg("PA", seq=1, ack=1, data=b"hello"))
    talk.guest(seg("A", ack=6))
    talk.silence()

Sequence numbers are relative: the guest's to its ISN, ours to our ISS, so the SYN of either side is 0. What a guest's
segment does not say is what a well-behaved guest would send; what an expected one does not say may be anything, PSH
too. A frame that nobody expected is an error at the next step.
"""

from __future__ import annotations

from netstack.core.flows import Limits, flow_key
from netstack.core.tcp import STATE_NAMES, TcpFlow
from netstack.wire.tcp import ACK, FIN, PSH, SYN
from tests.fakes import FakeLink, FakeSocket
from tests.frames import Received, Seg, letters, read_segment, syn_options, tcp_frame
from tests.world import GUEST4, GUEST6, GUEST_MAC, WORLD4, WORLD6, World

M = 0xFFFFFFFF
ISN = 0xFFFFFF00  # the guest's: so that numbers wrap around soon

seg = Seg


class Talk:
    """One connection of one guest in a world of fakes."""

    def __init__(
        self,
        *,
        world: World | None = None,
        link: FakeLink | None = None,
        ipv6: bool = False,
        mtu: int = 1500,
        limits: Limits | None = None,
        mac: bytes = GUEST_MAC,
        guest: bytes | None = None,
        guest_port: int = 40000,
        peer: bytes | None = None,
        peer_port: int = 80,
        isn: int = ISN,
    ) -> None:
        self.world = world or World(limits=limits)
        self.link = link or (self.world.links[0] if self.world.links else self.world.add_link(mtu=mtu))
        self.mac = mac
        self.address = guest or (GUEST6 if ipv6 else GUEST4)
        self.port = guest_port
        self.peer = peer or (WORLD6 if ipv6 else WORLD4)
        self.peer_port = peer_port
        self.isn = isn
        self.iss: int | None = None  # ours, once it was seen
        self.next = 0  # the guest's SND.NXT, relative
        self.heard = 0  # the guest's RCV.NXT, relative: what it has received in order
        self.window = 65535  # what the guest's segments say
        self.scale = 0  # shift of the windows that we send
        self._got: list[Received] = []
        self._sock: FakeSocket | None = None
        self.started = self.world.now

    # ---- state

    @property
    def flow(self) -> TcpFlow:
        flow = self.world.stack.flows.tcp.get(flow_key(self.address, self.port, self.peer, self.peer_port))
        assert flow is not None, "there is no such flow any more"
        return flow

    @property
    def state(self) -> str:
        flow = self.world.stack.flows.tcp.get(flow_key(self.address, self.port, self.peer, self.peer_port))
        return "CLOSED" if flow is None else STATE_NAMES[flow.state]

    @property
    def host(self) -> FakeSocket:
        """The host's socket: the peer's view of this connection."""
        if self._sock is None:
            sock = self.flow.sock
            assert isinstance(sock, FakeSocket)
            self._sock = sock
        return self._sock

    @property
    def drops(self) -> dict[str, int]:
        return self.world.drops

    # ---- the dialogue

    def frame(self, segment: Seg) -> bytes:
        """The frame of a guest's segment; moves the guest's SND.NXT."""
        bits = segment.bits
        seq = self.next if segment.seq is None else segment.seq
        data = segment.data or b""
        ack = self.heard if segment.ack is None else segment.ack
        end = seq + len(data) + bool(bits & SYN) + bool(bits & FIN)
        if segment.seq is None:
            self.next = end
        options = syn_options(segment.mss, segment.scale) if segment.options is None else segment.options
        return tcp_frame(
            self.world.mac,
            self.mac,
            self.address,
            self.peer,
            (self.port, self.peer_port),
            self.isn + seq,
            (self.iss or 0) + ack if bits & ACK else 0,
            bits,
            self.window if segment.win is None else segment.win,
            data,
            options,
        )

    def guest(self, *segments: Seg) -> None:
        """The guest sends these in one batch; everything that follows at this moment happens."""
        self._nothing_unexpected()
        self.world.receive(self.link, *[self.frame(segment) for segment in segments])

    def settle(self) -> None:
        """The host's side did something: let it be noticed."""
        self.world.settle()

    def at(self, seconds: float) -> None:
        """Go on at this many seconds after the beginning."""
        self._nothing_unexpected()
        self.world.advance(self.started + seconds)

    def wait(self, seconds: float) -> None:
        """Let so much time go by."""
        self._nothing_unexpected()
        self.world.advance(self.world.now + seconds)

    def expect(self, *wanted: Seg) -> list[Received]:
        """The next segments to the guest are these. Returns them as they were."""
        got = self._receive()
        assert len(got) >= len(wanted), f"the guest got {self._spell(got)}, not {wanted}"
        for each, want in zip(got, wanted):
            self._compare(each, want)
        del got[: len(wanted)]
        return self._last(wanted)

    def silence(self) -> None:
        """The guest received nothing more."""
        self._nothing_unexpected()

    def received(self) -> list[Received]:
        """All that the guest received and nobody looked at, taken away."""
        got, self._got = self._receive(), []
        return got

    def data(self) -> bytes:
        """What the guest received in order, of segments that nobody looked at; assert that nothing else came."""
        pieces = []
        at: int | None = None
        for each in self.received():
            assert letters(each.bits & ~PSH) == "A"
            assert at is None or at == each.seq
            at = (each.seq + len(each.data)) & M
            pieces.append(each.data)
        return b"".join(pieces)

    # ---- how

    def _receive(self) -> list[Received]:
        for frame in self.world.take(self.link):
            each = read_segment(frame)
            if each is None or (each.dst, each.dst_port, each.src) != (self.address, self.port, self.peer):
                raise AssertionError(f"a frame that is not of this connection: {frame.hex()}")
            self._note(each)
            self._got.append(each)
        self._shown: list[Received] = []
        return self._got

    def _note(self, each: Received) -> None:
        if each.bits & SYN:
            self.iss = each.seq
            self.heard = max(self.heard, 1)
        if self.iss is None:
            return
        seq = (each.seq - self.iss) & M
        end = seq + len(each.data) + bool(each.bits & FIN)
        if seq <= self.heard < end:
            self.heard = end

    def _last(self, wanted: tuple[Seg, ...]) -> list[Received]:
        return self._shown[-len(wanted) :]

    def _compare(self, got: Received, want: Seg) -> None:
        self._shown.append(got)
        words = f"got {self._spell([got])}, wanted {want}"
        bits = got.bits if want.bits & PSH else got.bits & ~PSH
        assert bits == want.bits, words
        assert got.src_port == self.peer_port
        if want.seq is not None:
            assert (got.seq - (self.iss or 0)) & M == want.seq & M, words
        if want.ack is not None:
            assert got.bits & ACK, words
            assert (got.ack - self.isn) & M == want.ack & M, words
        if want.data is not None:
            assert got.data == want.data, words
        if want.win is not None:
            assert got.win == want.win, words
        if want.mss is not None:
            assert got.mss == want.mss, words
        if want.scale is not None:
            assert got.scale == (None if want.scale < 0 else want.scale), words

    def _spell(self, segments: list[Received]) -> str:
        words = []
        for each in segments:
            seq = (each.seq - (self.iss or 0)) & M
            ack = f" ack {(each.ack - self.isn) & M}" if each.bits & ACK else ""
            words.append(f"{letters(each.bits)} {seq}({len(each.data)}){ack} win {each.win}")
        return "[" + ", ".join(words) + "]"

    def _nothing_unexpected(self) -> None:
        got = self._receive()
        assert not got, f"unexpected: {self._spell(got)}"


# ---- connections in each state of RFC 9293 3.3.2


def established(
    *, mss: int | None = 1460, scale: int | None = 7, window: int = 65535, talk: Talk | None = None, **where: object
) -> Talk:
    """A guest opened a connection; the clock of the dialogue begins now."""
    talk = talk or Talk(**where)  # type: ignore[arg-type]
    talk.guest(seg("S", win=min(65535, window << (scale or 0)), mss=mss, scale=scale))
    talk.expect(seg("SA", seq=0, ack=1))
    talk.window = window
    talk.guest(seg("A"))
    talk.silence()
    assert talk.state == "ESTABLISHED"
    assert talk.host.connected
    talk.scale = talk.flow.rcv_shift
    talk.started = talk.world.now
    return talk


def close_wait(**how: object) -> Talk:
    """The guest said FIN first."""
    talk = established(**how)  # type: ignore[arg-type]
    talk.guest(seg("FA"))
    talk.expect(seg("A", seq=1, ack=2))
    assert talk.state == "CLOSE_WAIT"
    assert talk.host.shut
    return talk


def last_ack(**how: object) -> Talk:
    """Then the host did."""
    talk = close_wait(**how)
    talk.host.closes()
    talk.settle()
    talk.expect(seg("FA", seq=1, ack=2))
    assert talk.state == "LAST_ACK"
    return talk


def fin_wait_1(**how: object) -> Talk:
    """The host said FIN first, and the guest has not acknowledged it."""
    talk = established(**how)  # type: ignore[arg-type]
    talk.host.closes()
    talk.settle()
    talk.expect(seg("FA", seq=1, ack=1))
    assert talk.state == "FIN_WAIT_1"
    return talk


def fin_wait_2(**how: object) -> Talk:
    """Now it has."""
    talk = fin_wait_1(**how)
    talk.guest(seg("A", ack=2))
    talk.silence()
    assert talk.state == "FIN_WAIT_2"
    return talk


def closing(**how: object) -> Talk:
    """Both said FIN, and they crossed."""
    talk = fin_wait_1(**how)
    talk.guest(seg("FA", ack=1))
    talk.expect(seg("A", seq=2, ack=2))
    assert talk.state == "CLOSING"
    return talk


def time_wait(**how: object) -> Talk:
    """The guest's FIN came last."""
    talk = fin_wait_2(**how)
    talk.guest(seg("FA", ack=2))
    talk.expect(seg("A", seq=2, ack=2))
    assert talk.state == "TIME_WAIT"
    assert talk.host.closed
    assert not talk.host.was_reset
    return talk
