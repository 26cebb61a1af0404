"""One TCP conversation between a guest and a host socket (RFC 9293).

Rule 1: every state and every transition of the connection lives in this file. `core.tcp_output` sends what this file
decided to send and keeps what is not acknowledged yet; it changes no state.
Rule 2: nothing here waits, and nothing here raises for what a guest sends.

Theory of operation
-------------------
A flow stands between two TCPs: the guest's, to which it is a real endpoint with the RFC's variables, and the host
kernel's, which it uses through a non-blocking socket. It holds no data that either of them could hold: segments from
the guest are gathered during a batch and written to the socket in one call when the batch ends; data for the guest is
read from the socket only when the guest's window has room for it, and stays referenced until acknowledged.

A guest opens (SYN): the flow is CONNECTING, which is SYN-RECEIVED with the SYN-ACK held back until the host's connect()
succeeded, so that a refused port is refused and a black hole is a black hole. The host opens (a forward): SYN-SENT.

    CONNECTING --connect() ok, SYN-ACK--> SYN_RECEIVED --ACK--> ESTABLISHED
    SYN_SENT --SYN-ACK--> ESTABLISHED
    ESTABLISHED --end of file from the host, FIN--> FIN_WAIT_1 --ACK of FIN--> FIN_WAIT_2 --guest's FIN--> TIME_WAIT
    ESTABLISHED --guest's FIN, shutdown(SHUT_WR)--> CLOSE_WAIT --end of file from the host, FIN--> LAST_ACK --ACK--> ...
    FIN_WAIT_1 --guest's FIN--> CLOSING --ACK of FIN--> TIME_WAIT --2 s--> CLOSED

A batch: `on_segment` is called for each segment and only moves variables; `finish_batch` then writes to the host, frees
what was acknowledged, sends what the new window allows, and decides about at most one ACK. An ACK of less than two full
segments waits up to `stack.ACK_DELAY`, so that the answer of the host carries it.

Timers: `rtx_at` (retransmission, zero-window probe, handshake) and `idle_at` (keep-alive, TIME-WAIT); the earlier one
is in `core.timers`. There is no congestion control toward the guest: the link does not lose frames by itself, and a
guest that drops them is served by retransmission (RFC 6298, RFC 5681 section 3.2, RFC 6582).

Urgent data is data (RFC 6093 advises applications against more). Sequence numbers are compared modulo 2**32: a
difference below 2**31 means "not before".
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from netstack.core import tcp_output
from netstack.core.datagrams import format_endpoint
from netstack.core.ports import FAILED, HUNG_UP, PEER_CLOSED, READABLE, SHUT_WR, WRITABLE, HostSocket, Link
from netstack.core.segments import SegmentWriter
from netstack.core.tcp_output import RCV_INITIAL, RCV_MAXIMUM, RCV_SHIFT
from netstack.core.timers import NEVER
from netstack.wire.tcp import ACK, FIN, RST, SYN, TcpOptions

if TYPE_CHECKING:
    from netstack.core.flows import FlowKey
    from netstack.core.forwards import TcpForward
    from netstack.core.neighbors import Neighbor
    from netstack.core.stack import Stack


CLOSED, CONNECTING, SYN_SENT, SYN_RECEIVED, ESTABLISHED = range(5)
FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, CLOSING, LAST_ACK, TIME_WAIT = range(5, 11)
STATE_NAMES = (
    "CLOSED CONNECTING SYN_SENT SYN_RECEIVED ESTABLISHED FIN_WAIT_1 FIN_WAIT_2 CLOSE_WAIT CLOSING LAST_ACK TIME_WAIT"
).split()

_RECEIVING = frozenset((ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2))
_FINISHED_BY_GUEST = frozenset((CLOSE_WAIT, CLOSING, LAST_ACK, TIME_WAIT))

OnOpened = Callable[["TcpFlow", int], object]

M = 0xFFFFFFFF
HALF = 0x80000000

_CONTROL = FIN | SYN | RST | ACK

# RFC 9293 3.4.2 has an MSL of two minutes for the internet. Frames on a virtual wire do not linger: nothing older than
# a second can arrive, so 2 MSL is 2 s; a new SYN with a higher sequence number ends it at once (RFC 9293 3.10.7.4).
TIME_WAIT_SECONDS = 2.0

# Deadlines that are seconds away share a wakeup with those of the same eighth of a second.
_COARSE = 0.125

# How many segments out of order are kept, and how many duplicate ACKs one batch may answer them with (RFC 5681: three
# make the guest retransmit).
OUT_OF_ORDER_SEGMENTS = 256
_DUPLICATE_ACKS = 3

# What such a segment costs besides its bytes, and the budget must count: tuple, bytes object and int (CPython, 64 bit).
OUT_OF_ORDER_OVERHEAD = 128

# RFC 9293 3.8.6.3 asks for an ACK for every second segment. A guest that has had half a megabyte in flight is not kept
# waiting by one for every fourth, which are 256 KiB at the largest MTU: each ACK wakes its network card's process.
_IN_BULK = 4

# RFC 5961 section 7: challenge ACKs are limited; one flow may send this many a second.
_CHALLENGE_ACKS = 10

# RFC 1122 4.2.3.6: keep-alives are to be configurable and, unless asked for, not sooner than two hours. A gateway that
# holds host sockets for guests that vanish cannot wait that long; five minutes of silence, then six probes of 30 s.
KEEPALIVE_IDLE = 300.0
KEEPALIVE_INTERVAL = 30.0
KEEPALIVE_PROBES = 6

# How long a host that takes nothing is waited for when the guest's side has closed: Linux' tcp_fin_timeout, which it
# grants to orphaned connections.
LINGER = 60.0

# recv(2): look, and leave it there. The same number on every system netstack runs on.
_MSG_PEEK = 2

# What a service wrote before it hands a connection over is read in so many calls at most: its socket's buffer holds
# some 200 KiB (Linux: net.core.wmem_default), one call takes 64 KiB or what the guest's window has room for.
_LAST_READS = 8

# How long the flows of a guest outlive its link: QEMU's reconnect, and netstack's own, try every few seconds.
LINK_GRACE = 30.0


def _coarse(at: float) -> float:
    """A deadline for which a little later will do: at once with many others, so that they share a wakeup."""
    return -(-at // _COARSE) * _COARSE


class TcpFlow:
    """One TCP conversation; every change of its state happens in this file (RFC 9293)."""

    __slots__ = (
        "_asked_at",
        "_challenge_at",
        "_challenges",
        "_dup_acks_due",
        "_keepalive_probes",
        "ack_due",
        "ack_listed",
        "acked",
        "batch",
        "bytes_from_guest",
        "bytes_to_guest",
        "dup_acks",
        "fast",
        "fd",
        "fin_sent",
        "forward",
        "guest",
        "guest_fin",
        "guest_port",
        "heap_at",
        "heard_at",
        "host_eof",
        "host_shut",
        "idle_at",
        "in_recovery",
        "interest",
        "irs",
        "iss",
        "key",
        "last_ack",
        "link",
        "link_lost",
        "mac",
        "mac_low",
        "max_snd_wnd",
        "mss",
        "on_opened",
        "opened_at",
        "out_of_order",
        "peer",
        "peer_port",
        "probe",
        "rcv_adv",
        "rcv_limit",
        "rcv_nxt",
        "rcv_shift",
        "recover",
        "resent",
        "retries",
        "rto",
        "rtt_at",
        "rtt_seq",
        "rttvar",
        "rtx",
        "rtx_at",
        "sending",
        "shares",
        "snd_nxt",
        "snd_shift",
        "snd_una",
        "snd_wl1",
        "snd_wl2",
        "snd_wnd",
        "sock",
        "srtt",
        "stack",
        "stalled",
        "state",
        "timer_at",
        "to_host",
        "to_host_bytes",
        "touched",
        "waits_for_link",
        "window_shut",
        "writer",
    )

    def __init__(
        self,
        stack: Stack,
        link: Link,
        mac: bytes,
        key: FlowKey,
        guest: bytes,
        guest_port: int,
        peer: bytes,
        peer_port: int,
        now: float,
    ) -> None:
        """A closed flow; open_from_guest() or open_to_guest() comes next."""
        self.stack = stack
        self.link = link
        self.mac = mac
        self.mac_low = int.from_bytes(mac[2:], "big")  # as the fast path has it at hand (Stack._receive)
        self.key = key
        self.guest = guest
        self.guest_port = guest_port
        self.peer = peer
        self.peer_port = peer_port
        self.writer = SegmentWriter(link, mac, stack.mac, peer, guest, peer_port << 16 | guest_port)
        self.shares = stack.budgets.of(link)  # of what the guest may make us hold
        self.state = CLOSED
        self.fast = False  # nothing is special: ESTABLISHED, FIN_WAIT_2, or CLOSE_WAIT, where no data may arrive
        self.sock: HostSocket | None = None
        self.fd = -1
        self.interest = -1  # the events registered with the poller; -1: not registered
        self.on_opened: OnOpened | None = None
        self.forward: TcpForward | None = None  # which brought it, and hears of its end
        # The send sequence space (RFC 9293 3.3.1). Invariant: snd_una <= snd_nxt. What lies before snd_una is gone.
        self.iss = self.snd_una = self.snd_nxt = stack.initial_sequence(key, now)
        self.snd_wnd = self.snd_wl1 = self.snd_wl2 = 0
        self.max_snd_wnd = 0
        self.snd_shift = 0
        self.mss = 536  # RFC 9293 3.7.1, until the guest's option says more
        self.rtx: deque[tuple[int, memoryview]] = deque()  # (sequence number, bytes) sent and not acknowledged
        self.sending = False  # data of the host may be sent: ESTABLISHED or CLOSE_WAIT, and no end of file yet
        self.host_eof = self.host_shut = self.fin_sent = False
        self.stalled = False  # the host may have data that the guest's window or link has no room for
        self.waits_for_link = False
        self.window_shut = False  # the guest's window closed over what is in flight
        # The receive sequence space. rcv_adv is RCV.NXT + RCV.WND, the right edge we promised; it never moves left.
        self.irs = self.rcv_nxt = self.rcv_adv = self.last_ack = 0
        self.rcv_shift = 0
        self.rcv_limit = RCV_INITIAL
        self.batch: list[memoryview] = []
        self.to_host: deque[bytes] | None = None  # what the host's socket did not take yet
        self.to_host_bytes = 0
        self.guest_fin = False
        self.out_of_order: list[tuple[int, bytes]] | None = None
        self.touched = self.acked = self.ack_due = self.ack_listed = False
        self._dup_acks_due = 0
        self.dup_acks = 0
        self.in_recovery = False
        self.recover = self.resent = 0
        self.probe = tcp_output.NO_PROBE
        self.srtt = self.rttvar = 0.0
        self.rto = tcp_output.RTO_INITIAL
        self.rtt_at = 0.0
        self.rtt_seq = 0
        self.retries = 0
        self.rtx_at = self.idle_at = self.timer_at = self.heap_at = NEVER
        self.heard_at = self.opened_at = now
        self._keepalive_probes = 0
        self._asked_at = now  # when the last of them was sent, or the link was lost
        self.link_lost = False
        self._challenges = 0
        self._challenge_at = 0.0
        self.bytes_from_guest = self.bytes_to_guest = 0

    # ---- opening ---------------------------------------------------------------------------------------------------

    def open_from_guest(self, sock: HostSocket, *, connected: bool, now: float) -> None:
        """LISTEN, a SYN arrived (take_syn), and `sock` has begun to connect: the SYN-ACK waits for it."""
        self._attach(sock)
        if connected:
            self._answer_syn(now)
            return
        self.state = CONNECTING
        self._watch(WRITABLE)

    def open_to_guest(self, sock: HostSocket, on_opened: OnOpened | None, now: float) -> None:
        """Active OPEN toward the guest for `sock`, a connection that the host has.

        on_opened(flow, errno) tells how it ended. After a failure it may answer True, and then the socket is its own
        again; else it is reset. Nothing is read from the host before the guest answered.
        """
        self._attach(sock)
        self.on_opened = on_opened
        self.state = SYN_SENT
        self.rcv_shift = RCV_SHIFT
        tcp_output.send_syn(self, now)

    def _attach(self, sock: HostSocket) -> None:
        self.sock = sock
        self.fd = sock.fileno()

    def take_syn(self, seq: int, window: int, mss: int | None, window_scale: int | None) -> None:
        """The guest's SYN: its sequence space, its window and what its options allow."""
        self.irs = seq
        self.rcv_nxt = self.rcv_adv = self.last_ack = (seq + 1) & M
        self.mss = tcp_output.send_mss(self, mss)
        if window_scale is None:
            self.snd_shift = self.rcv_shift = 0  # RFC 7323 2.2: both sides or neither
        else:
            self.snd_shift = window_scale
            self.rcv_shift = RCV_SHIFT
        self.snd_wnd = self.max_snd_wnd = window  # the window of a SYN is never scaled
        self.snd_wl1 = seq

    def replace_socket(self, old: HostSocket, new: HostSocket, early: bytes, now: float) -> bool:
        """Go on with `new`, connected, in place of `old`: a service of ours has found whom the guest wants to talk to.

        So a tunnel through the gateway's proxy is from here on a flow like any other, and no byte of it passes through
        the service. What the service has written to its end of `old` reaches the guest first; `early` is what the
        guest had sent and the service had read. False: not now, because the guest's window is full, say, or `old` is
        not what we have any more; then nothing has changed. On True `old` is closed and `new` is the flow's.
        """
        for _ in range(_LAST_READS):
            if self.sock is not old or not self.sending:
                return False
            try:
                if not old.recv_into(bytearray(1), 1, _MSG_PEEK):
                    return False
            except BlockingIOError:
                break
            except OSError:
                return False
            tcp_output.pump(self, now)
            if self.stalled:
                return False
        else:
            return False
        self._unwatch()
        old.close()
        self._attach(new)
        self.host_shut = False
        if early:
            self.to_host = deque((early, *(self.to_host or ())))
            self.to_host_bytes += len(early)
            self.shares.for_host.add(len(early))
        try:
            self._watch(READABLE | WRITABLE if self.to_host else READABLE)
        except OSError:  # the poller's own limits
            self.abort(now, "host exhausted", tell_guest=True)
            return True
        if self.to_host:
            self._flush_to_host(now)
        elif self.guest_fin:
            self._shutdown_host(now)
        return True

    def _establish(self, now: float) -> None:
        self.state = ESTABLISHED
        self.fast = self.sending = True
        self.rtx_at = NEVER
        self.retries = 0
        self.idle_at = now + KEEPALIVE_IDLE
        self._arm()
        self._watch(READABLE)
        if self.on_opened is not None:
            self.on_opened(self, 0)
            self.on_opened = None
        self.stack.on_flow_opened(self)

    # ---- from the host ---------------------------------------------------------------------------------------------

    def on_ready(self, events: int, now: float) -> None:
        """The host's socket is readable, writable or broken."""
        state = self.state
        if state == CONNECTING:
            self._on_connected(events, now)
            return
        if events & WRITABLE and self.to_host:
            self._flush_to_host(now)
            if self.sock is None:
                return
        if events & (READABLE | FAILED | HUNG_UP):
            if self.sending:
                tcp_output.pump(self, now)
                if events & PEER_CLOSED and not self.stalled:
                    tcp_output.pump(self, now)  # the end, most likely: its FIN leaves with the data
                if events & (FAILED | HUNG_UP) and self.stalled:
                    # Level-triggered, and reported whether asked for or not: a broken socket whose last bytes wait for
                    # the guest's window would wake us for ever. The guest's next ACK pumps it without the poller.
                    self._unwatch()
            elif self.to_host and events & FAILED:
                self._flush_to_host(now)
            elif state == SYN_SENT and events & (FAILED | HUNG_UP):
                self.abort(now, "caller gave up", tell_guest=True, error=tcp_output.ECONNABORTED)
            elif events & (FAILED | HUNG_UP):
                self._unwatch()
            elif state == SYN_RECEIVED:
                self._watch(0)  # its peer speaks first; _establish() asks again

    def _on_connected(self, events: int, now: float) -> None:
        """CONNECTING: connect() ended."""
        sock = self.sock
        assert sock is not None
        # A connect() that failed is reported as FAILED and HUNG_UP besides (Linux: tcp_poll; kqueue: EV_EOF).
        error = self.stack.host.connect_error(sock) if events != WRITABLE else 0
        if error:
            self.stack.refuse_tcp(self, error, now)
            return
        self._answer_syn(now)

    def _answer_syn(self, now: float) -> None:
        """connect() succeeded: LISTEN to SYN-RECEIVED."""
        self.state = SYN_RECEIVED
        self._watch(READABLE)  # what will be needed: peers that speak first are the fewer
        tcp_output.send_syn_ack(self, now)

    def on_host_eof(self, now: float) -> None:
        """The host sent FIN: all its data has been read and sent; send ours behind it."""
        self.host_eof = True
        self.sending = False
        if self.to_host:
            self._watch(WRITABLE)
        else:
            self._unwatch()
        tcp_output.send_fin(self, now)
        self.state = FIN_WAIT_1 if self.state == ESTABLISHED else LAST_ACK
        self.fast = False

    def on_host_failed(self, now: float, why: str = "host reset") -> None:
        """The host's connection is broken: the guest sees RST."""
        self.abort(now, why, tell_guest=True)

    def on_drained(self, now: float) -> None:
        """The guest's link has room again."""
        self.waits_for_link = False
        if self.stalled:
            tcp_output.pump(self, now)

    # ---- from the guest --------------------------------------------------------------------------------------------

    def on_segment(
        self,
        seq: int,
        ack: int,
        flags: int,
        window: int,
        buffer: memoryview,
        start: int,
        end: int,
        now: float,
        options: TcpOptions | None = None,
    ) -> None:
        """Take one segment, its payload at buffer[start:end]; `options` come with SYN only. Untrusted."""
        if not self.touched:
            self.touched = True
            self.stack.touched.append(self)
        # Fast path: in order, nothing but ACK and PSH (URG is data), an ACK that is not from the future.
        if self.fast and seq == self.rcv_nxt and flags & _CONTROL == ACK:
            una = self.snd_una
            acked = (ack - una) & M
            if acked <= (self.snd_nxt - una) & M:
                n = end - start
                if n <= (self.rcv_adv - seq) & M and not (n and self.guest_fin):
                    window <<= self.snd_shift
                    if acked:
                        self.snd_una = ack
                        self.acked = True
                        self.dup_acks = 0
                    elif not n and window == self.snd_wnd and self.rtx:
                        self.dup_acks += 1
                    # RFC 9293 3.10.7.4: SEG.SEQ is RCV.NXT and SEG.ACK is at least SND.UNA, so SND.WL1 and SND.WL2
                    # cannot be newer, and the window is news.
                    self.snd_wnd = window
                    self.snd_wl1 = seq
                    self.snd_wl2 = ack
                    if n:
                        self.rcv_nxt = (seq + n) & M
                        self.batch.append(buffer[start:end])
                        self.ack_due = True
                    return
        self._on_segment_slow(seq, ack, flags, window, buffer, start, end, now, options)

    def on_large_segment(
        self, seq: int, ack: int, flags: int, window: int, views: list[memoryview], length: int
    ) -> bool:
        """Take one segment whose payload lies in pieces, if it is just what is expected. Untrusted.

        False: nothing has happened; on_segment() is to have it, in one piece. These are its fast path's rules.
        """
        una = self.snd_una
        acked = (ack - una) & M
        if (
            not self.fast
            or self.guest_fin
            or seq != self.rcv_nxt
            or flags & _CONTROL != ACK
            or acked > (self.snd_nxt - una) & M
            or not 0 < length <= (self.rcv_adv - seq) & M
        ):
            return False
        if not self.touched:
            self.touched = True
            self.stack.touched.append(self)
        if acked:
            self.snd_una = ack
            self.acked = True
            self.dup_acks = 0
        self.snd_wnd = window << self.snd_shift
        self.snd_wl1 = seq
        self.snd_wl2 = ack
        self.rcv_nxt = (seq + length) & M
        self.batch += views
        self.ack_due = True
        return True

    def _on_segment_slow(
        self,
        seq: int,
        ack: int,
        flags: int,
        window: int,
        buffer: memoryview,
        start: int,
        end: int,
        now: float,
        options: TcpOptions | None,
    ) -> None:
        """RFC 9293 3.10.7.3 and 3.10.7.4, step by step."""
        state = self.state
        if state == CLOSED:
            return
        if state == CONNECTING:
            # A retransmitted SYN waits, as the first one does. The guest may give up.
            if flags & RST and seq in (self.irs, self.rcv_nxt):
                self.abort(now, "guest reset", tell_guest=False)
            return
        if state == SYN_SENT:
            self._on_segment_syn_sent(seq, ack, flags, window, options, now)
            return
        if state == SYN_RECEIVED and flags & (SYN | ACK | RST) == SYN and seq == self.irs:
            tcp_output.send_syn_ack(self, now)
            self.rtt_at = 0.0  # Karn's algorithm (RFC 6298 section 3)
            return
        if self.out_of_order:
            self._take_out_of_order(now)  # the gap before this segment may be filled by now, in this very batch

        # First, check the sequence number (3.10.7.4). In a zero window only SEG.SEQ = RCV.NXT is acceptable; its data
        # is not, but its ACK and RST are (3.8.6).
        n = end - start
        space = (self.rcv_adv - self.rcv_nxt) & M
        offset = (seq - self.rcv_nxt) & M  # where it begins, in front of RCV.NXT; HALF and more: behind
        length = n + (flags >> 1 & 1) + (flags & 1)
        acceptable = offset < space or offset == 0
        if not acceptable and length:
            last = (offset + length - 1) & M
            acceptable = last < space
        if not acceptable:
            if not flags & RST:
                self._answer_unacceptable(flags, n, now)
            return

        # Second, RST (RFC 5961 3.2): exactly RCV.NXT resets, elsewhere in the window it is challenged.
        if flags & RST:
            if offset == 0:
                self.abort(now, "guest reset", tell_guest=False)
            else:
                self._challenge(now)
            return
        # Fourth, SYN in the window (RFC 5961 4.2): challenge.
        if flags & SYN:
            self._challenge(now)
            return
        # Fifth, the ACK field.
        if not flags & ACK:
            self.stack.counters.drop("tcp_no_ack")
            return
        if not self._on_ack(seq, ack, window, n, now):
            return
        # Seventh, the data; eighth, FIN.
        state = self.state
        if state in _RECEIVING:
            fin = flags & FIN
            if offset >= HALF:  # begins before RCV.NXT: a retransmission with something new behind
                skip = (-offset) & M
                start += skip
                n -= skip
                seq = self.rcv_nxt
                offset = 0
            if n > space - offset:
                n = space - offset  # beyond the window we promised
                end = start + max(n, 0)
                fin = 0
            if offset == 0:
                if n > 0:
                    self.rcv_nxt = (seq + n) & M
                    self.batch.append(buffer[start:end])
                    self.ack_due = True
                elif length and not fin:
                    self.ack_due = True  # a probe of our zero window
                if fin:
                    self._on_guest_fin(now)
            elif n > 0 or fin:
                self._dup_acks_due += 1  # a gap lies before it (RFC 5681 4.2)
                if n > 0:
                    self._keep_out_of_order(seq, buffer[start:end])
                if fin:
                    self._keep_out_of_order((seq + n) & M, buffer[end:end])

    def _on_segment_syn_sent(
        self, seq: int, ack: int, flags: int, window: int, options: TcpOptions | None, now: float
    ) -> None:
        """RFC 9293 3.10.7.3."""
        if flags & ACK and ((ack - self.iss - 1) & M) >= ((self.snd_nxt - self.iss) & M):
            if not flags & RST:
                self._reset_segment(ack)
            return
        if flags & RST:
            if flags & ACK:
                self.abort(now, "refused", tell_guest=False, error=tcp_output.ECONNREFUSED)
            return
        if not flags & SYN or options is None:
            return
        self.take_syn(seq, window, options.mss, options.window_scale)
        if flags & ACK:
            self.snd_una = self.snd_wl2 = ack
            tcp_output.measure_rtt(self, now)
            self.ack_due = True
            self._dup_acks_due = 1  # at once: the guest's server is told of the connection by this
            self._establish(now)
        else:
            self.state = SYN_RECEIVED  # both opened at once (3.5, figure 7)
            self._watch(0)
            tcp_output.send_syn_ack(self, now)

    def _answer_unacceptable(self, flags: int, n: int, now: float) -> None:
        """3.10.7.4, first: an ACK, and the segment is dropped. Keep-alives of the guest and lost ACKs end here.

        Answers to what may itself be such an answer are limited, or two ends that do not agree on the numbers go on
        for ever (Linux: tcp_oow_rate_limited). Data and FIN ask for an ACK that was lost.
        """
        if flags & SYN or not (n or flags & FIN):
            self._challenge(now)
            return
        if self.state == TIME_WAIT and flags & FIN:
            self._enter_time_wait(now)  # the FIN again: our ACK was lost
        self.ack_due = True
        self._dup_acks_due = max(self._dup_acks_due, 1)

    def _on_ack(self, seq: int, ack: int, window: int, n: int, now: float) -> bool:
        """3.10.7.4, fifth. False: the segment is finished with."""
        una = self.snd_una
        acked = (ack - una) & M
        sent = (self.snd_nxt - una) & M
        if self.state == SYN_RECEIVED:
            if not 0 < acked <= sent:
                self._reset_segment(ack)
                return False
            tcp_output.measure_rtt(self, now)
            self.snd_una = ack
            self.snd_wnd = window << self.snd_shift
            self.snd_wl1 = seq
            self.snd_wl2 = ack
            self._establish(now)
            return True
        if acked > sent:
            # Beyond what we sent, or before SND.UNA. RFC 5961 5.2: older than the largest window is challenged too.
            if acked < HALF or (-acked & M) > max(self.max_snd_wnd, 65535):
                self._challenge(now)
                return False
            return True  # an old duplicate: its data may still be new
        scaled = window << self.snd_shift
        if acked:
            self.snd_una = ack
            self.acked = True
            self.dup_acks = 0
        elif not n and scaled == self.snd_wnd and self.rtx:
            self.dup_acks += 1
        if (seq - self.snd_wl1) & M < HALF and (seq != self.snd_wl1 or (ack - self.snd_wl2) & M < HALF):
            self.snd_wnd = scaled
            self.snd_wl1 = seq
            self.snd_wl2 = ack
        if self.fin_sent and ack == self.snd_nxt:
            if self.state == FIN_WAIT_1:
                self.state = FIN_WAIT_2
                self.fast = True
            elif self.state == CLOSING:
                self._enter_time_wait(now)
            elif self.state == LAST_ACK:
                self._close(now, "closed")
                return False
        return True

    def _on_guest_fin(self, now: float) -> None:
        """The guest will send no more: tell the host once it has taken all."""
        self.rcv_nxt = self.rcv_adv = (self.rcv_nxt + 1) & M
        self.guest_fin = True
        self.ack_due = True
        self._dup_acks_due = max(self._dup_acks_due, 1)  # at once: the guest waits for it in FIN-WAIT-1
        self._forget_out_of_order()
        self.fast = False
        if self.state == ESTABLISHED:
            self.state = CLOSE_WAIT
            self.fast = True  # a guest that has said all may yet receive gigabytes
        elif self.state == FIN_WAIT_1:
            self.state = CLOSING
        elif self.state == FIN_WAIT_2:
            self._enter_time_wait(now)

    def _keep_out_of_order(self, seq: int, view: memoryview) -> None:
        """A gap lies before this segment: keep a copy. An empty one is the guest's FIN."""
        queue = self.out_of_order
        if queue is None:
            queue = self.out_of_order = []
            # A loss: the guest's queue overflowed or the window was too wide for it.
            self.rcv_limit = max(RCV_INITIAL, self.rcv_limit // 2)
        stack = self.stack
        cost = len(view) + OUT_OF_ORDER_OVERHEAD
        if len(queue) >= OUT_OF_ORDER_SEGMENTS or cost > self.shares.out_of_order.room():
            stack.counters.drop("tcp_out_of_order_full")
            return
        at = len(queue)
        offset = (seq - self.rcv_nxt) & M
        while at and (queue[at - 1][0] - self.rcv_nxt) & M > offset:
            at -= 1
        if at and queue[at - 1][0] == seq and len(queue[at - 1][1]) >= len(view):
            return
        queue.insert(at, (seq, bytes(view)))
        self.shares.out_of_order.add(cost)

    def _take_out_of_order(self, now: float) -> None:
        """Move what is in order now from the queue to the batch."""
        queue = self.out_of_order
        while queue:
            seq, data = queue[0]
            skip = (self.rcv_nxt - seq) & M
            if skip >= HALF:
                return
            del queue[0]
            self.shares.out_of_order.add(-len(data) - OUT_OF_ORDER_OVERHEAD)
            if skip < len(data):
                view = memoryview(data)[skip:]
                self.batch.append(view)
                self.rcv_nxt = (self.rcv_nxt + len(view)) & M
                self.ack_due = True
                self._dup_acks_due = max(self._dup_acks_due, 1)  # RFC 5681 4.2: at once when a gap is filled
            elif not data and not skip:
                self._on_guest_fin(now)
                return
        self.out_of_order = None

    def _forget_out_of_order(self) -> None:
        if self.out_of_order:
            self.shares.out_of_order.add(-self._out_of_order_cost())
        self.out_of_order = None

    def _out_of_order_cost(self) -> int:
        return sum(len(data) + OUT_OF_ORDER_OVERHEAD for _, data in self.out_of_order or ())

    def finish_batch(self, now: float) -> None:
        """The batch that touched this flow ends: deliver, free, send, acknowledge."""
        self.touched = False
        self.heard_at = now
        if self.out_of_order:
            self._take_out_of_order(now)
        if self.batch:
            self._deliver(now)
        if self.state == CLOSED:
            return
        if self.acked:
            self.acked = False
            tcp_output.on_acked(self, now)
        if self.dup_acks >= 3 and not self.in_recovery:
            tcp_output.fast_retransmit(self, now)
        if self.window_shut and self.snd_wnd:
            tcp_output.on_window_opened(self, now)
        if self.stalled:
            tcp_output.pump(self, now)
        if self.guest_fin and not self.to_host:
            self._shutdown_host(now)
        if self._dup_acks_due:
            for _ in range(min(self._dup_acks_due, _DUPLICATE_ACKS)):
                tcp_output.send_ack(self)
            self._dup_acks_due = 0
        elif self.ack_due:
            enough = self.mss * (2 if self.rcv_limit < RCV_MAXIMUM else _IN_BULK)
            # Or the guest's next segment does not fit into what it was promised: it waits for this.
            if (self.rcv_nxt - self.last_ack) & M >= enough or (self.rcv_adv - self.rcv_nxt) & M < self.mss:
                tcp_output.send_ack(self)
            elif not self.ack_listed:
                self.ack_listed = True
                self.stack.ack_later.append(self)

    # ---- to the host -----------------------------------------------------------------------------------------------

    def _deliver(self, now: float) -> None:
        """Write the batch to the host's socket in one call; keep what it does not take."""
        batch = self.batch
        self.batch = []
        total = sum(map(len, batch))
        self.bytes_from_guest += total
        sock = self.sock
        if sock is None:
            return  # the host's side is gone; only possible while closing
        if self.to_host:
            self._keep_for_host(batch, 0, now)
            return
        try:
            sent = sock.send(batch[0]) if len(batch) == 1 else sock.sendmsg(batch[:1024])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.on_host_failed(now, f"host: {error.strerror}")
            return
        if sent < total:
            self._keep_for_host(batch, sent, now)
            return
        # Evidence for a wider window: one batch filled half of it, and the host took all at once.
        if total >= self.rcv_limit >> 1 and self.rcv_limit < RCV_MAXIMUM and self.rcv_shift:
            self.rcv_limit = min(RCV_MAXIMUM, self.rcv_limit * 2)

    def _keep_for_host(self, batch: list[memoryview], skip: int, now: float) -> None:
        if self.to_host is None:
            self.to_host = deque()
        queue = self.to_host
        kept = 0
        for view in batch:
            if skip >= len(view):
                skip -= len(view)
                continue
            piece = bytes(view[skip:])
            skip = 0
            kept += len(piece)
            # The budget counts bytes, so one-byte segments must not cost an object each.
            if queue and len(queue[-1]) + len(piece) <= tcp_output.MERGED:
                queue[-1] += piece
            else:
                queue.append(piece)
        self.to_host_bytes += kept
        self.shares.for_host.add(kept)
        if self.shares.for_host.room() < 0:
            # Hosts that do not read hold all that may wait for them from this guest.
            self.stack.counters.drop("tcp_for_host_budget")
            self.abort(now, "host does not read", tell_guest=True)
            return
        self._watch(max(self.interest, 0) | WRITABLE)

    def _flush_to_host(self, now: float) -> None:
        """The host's socket has room for what was kept."""
        queue = self.to_host
        sock = self.sock
        if queue is None or sock is None:
            return
        taken = 0
        while queue:
            pieces = [queue[i] for i in range(min(len(queue), 256))]
            wanted = sum(map(len, pieces))
            try:
                sent = sock.sendmsg(pieces)
            except BlockingIOError:
                break
            except OSError as error:
                if self.state == CLOSED:  # the guest is done with it; nobody is left to tell
                    self._forget_to_host()
                    self._drop_socket()
                else:
                    self.on_host_failed(now, f"host: {error.strerror}")
                return
            taken += sent
            rest = sent
            while rest:
                first = queue[0]
                if rest < len(first):
                    queue[0] = first[rest:]
                    break
                rest -= len(first)
                queue.popleft()
            if sent < wanted:
                break
        self.to_host_bytes -= taken
        self.shares.for_host.add(-taken)
        if queue and taken and self.state == CLOSED:
            self._linger(now)
        if not queue:
            self.to_host = None
            if self.state == CLOSED:
                self._drop_socket()
                return
            self._watch(max(self.interest, 0) & ~WRITABLE)
            if self.guest_fin:
                self._shutdown_host(now)
                return
        if self.state in _RECEIVING and tcp_output.window_update_due(self):
            tcp_output.send_ack(self)

    def _shutdown_host(self, now: float) -> None:
        """The guest's FIN reaches the host, behind all its data. Called once or more."""
        sock = self.sock
        if sock is None:
            return
        if self.host_eof:
            self._drop_socket()  # both directions have ended: close() says the same
            return
        # Not twice: when the peer's FIN has come in as well, the socket is in TCP_CLOSE, whatever it still has to be
        # read, and shutdown() fails with ENOTCONN (Linux: inet_shutdown).
        if self.host_shut:
            return
        self.host_shut = True
        try:
            sock.shutdown(SHUT_WR)
        except OSError as error:
            self.on_host_failed(now, f"host: {error.strerror}")

    # ---- closing ---------------------------------------------------------------------------------------------------

    def _enter_time_wait(self, now: float) -> None:
        """3.6.1. Whatever is left to do for the host is done; only the memory of the sequence numbers stays."""
        self.state = TIME_WAIT
        self.fast = False
        self.rtx_at = NEVER
        self.idle_at = _coarse(now + TIME_WAIT_SECONDS)
        self._arm()
        self.stack.flows.note_time_wait(self)

    def abort(self, now: float, why: str, *, tell_guest: bool, error: int = tcp_output.ECONNRESET) -> None:
        """RST to the host's peer, and to the guest if it is to know; the flow is gone."""
        if self.state == CLOSED:
            return
        if tell_guest and self.state not in (CONNECTING, TIME_WAIT):
            self.stack.counters.tcp_resets_sent += 1
            self.writer.send(self.snd_nxt, self.rcv_nxt, RST | ACK, 0)
        sock = self.sock
        if sock is not None:
            if self.interest >= 0:
                self.stack.poller.unregister(self.fd)
                self.interest = -1
            self.sock = None
            on_opened, self.on_opened = self.on_opened, None
            # The forward owns the host's connection until the guest has answered, and may have another use for it.
            if on_opened is None or not on_opened(self, error):
                self.stack.host.reset(sock)
        self._forget_to_host()
        self._close(now, why)

    def _close(self, now: float, why: str) -> None:
        """CLOSED: out of the table. What the host has not taken yet is still written, then its socket closes."""
        stack = self.stack
        self.state = CLOSED
        self.fast = self.sending = False
        stack.timers.cancel(self)
        self.shares.in_flight.add(-tcp_output.held_bytes(self))
        self.rtx.clear()
        self._forget_out_of_order()
        self.ack_due = False
        if self.batch:
            self._deliver(now)
        if self.to_host:
            self._linger(now)
            stack.flows.linger(self)
        else:
            self._drop_socket()
        stack.on_flow_closed(self, why)

    def _linger(self, now: float) -> None:
        """CLOSED, and the host has not taken all: it may go on as long as it takes something every LINGER seconds."""
        self.rtx_at = NEVER
        self.idle_at = now + LINGER
        self.stack.timers.arm(self, self.idle_at)

    def drop(self) -> None:
        """CLOSED: give up what the host has not taken."""
        self._forget_to_host()
        self._drop_socket()

    def _drop_socket(self) -> None:
        sock = self.sock
        if sock is not None:
            self.sock = None
            if self.state == CLOSED:
                self.stack.timers.cancel(self)
                self.stack.flows.end_linger(self)
            if self.interest >= 0:
                self.stack.poller.unregister(self.fd)
                self.interest = -1
            sock.close()

    def _forget_to_host(self) -> None:
        if self.to_host:
            self.shares.for_host.add(-self.to_host_bytes)
            self.to_host = None
            self.to_host_bytes = 0
        self.batch = []

    def _challenge(self, now: float) -> None:
        """RFC 5961: an ACK that a blind attacker cannot use, limited in number (section 7)."""
        if now - self._challenge_at >= 1.0:
            self._challenge_at = now
            self._challenges = 0
        self._challenges += 1
        if self._challenges > _CHALLENGE_ACKS:
            self.stack.counters.drop("tcp_challenge_limited")
            return
        self.ack_due = True
        self._dup_acks_due = max(self._dup_acks_due, 1)

    def _reset_segment(self, ack: int) -> None:
        """RST in answer to an ACK of what we never sent, before the connection is synchronised (3.10.7.3, 3.10.7.4)."""
        self.stack.counters.tcp_resets_sent += 1
        self.writer.send(ack, 0, RST, 0)

    def send_refusal(self) -> None:
        """RST in answer to the guest's SYN (RFC 9293 3.10.7.1)."""
        self.writer.send(0, self.rcv_nxt, RST | ACK, 0)

    def is_superseded_by(self, seq: int) -> bool:
        """Whether a new SYN means that the guest began again: the first got no answer, and this is no copy of it."""
        return self.state == CONNECTING and seq != self.irs

    @property
    def is_finished_by_guest(self) -> bool:
        """Whether the guest has closed its half."""
        return self.state in _FINISHED_BY_GUEST

    def let_go(self, now: float) -> None:
        """The guest is gone for good. Where it had closed its half, the host's peer gets what it sent, and no reset."""
        if self.state in _FINISHED_BY_GUEST:
            self._close(now, "guest is gone")

    def make_way(self, now: float) -> None:
        """A new connection of the guest takes this one's place. What the host has not taken yet still reaches it."""
        if self.state == TIME_WAIT:
            self._close(now, "closed")
        else:
            self.abort(now, "superseded", tell_guest=False)

    # ---- the guest's link ------------------------------------------------------------------------------------------

    def move_to(self, link: Link) -> None:
        """The guest is on another link now; headers and MSS follow."""
        self.stack.flows.move(self, link)
        self.link = link
        in_flight = tcp_output.held_bytes(self)
        # The queue of the other link may refer to these chunks still: they must not be recycled (Stack.flush).
        self.rtx = deque((seq, memoryview(bytes(view))) for seq, view in self.rtx)
        out_of_order = self._out_of_order_cost()
        self.shares.in_flight.add(-in_flight)
        self.shares.for_host.add(-self.to_host_bytes)
        self.shares.out_of_order.add(-out_of_order)
        self.shares = self.stack.budgets.of(link)
        self.shares.in_flight.add(tcp_output.held_bytes(self))
        self.shares.for_host.add(self.to_host_bytes)
        self.shares.out_of_order.add(out_of_order)
        self.link_lost = False
        self.waits_for_link = False
        self.writer = SegmentWriter(
            link, self.mac, self.stack.mac, self.peer, self.guest, self.peer_port << 16 | self.guest_port
        )
        self.mss = min(self.mss, tcp_output.recv_mss(self) & ~3)

    def on_link_lost(self, now: float) -> None:
        """The guest's link is gone. Unless it comes back within LINK_GRACE the flow ends, and the peer hears it."""
        if self.state in (CONNECTING, SYN_SENT, SYN_RECEIVED):
            self.abort(now, "link lost", tell_guest=False)
            return
        self.link_lost = True
        if self.state != TIME_WAIT:
            self._keepalive_probes = KEEPALIVE_PROBES
            self._asked_at = now
            self.idle_at = now + LINK_GRACE
            self._arm()

    def _find_guest(self, now: float) -> None:
        """Its link was lost. A guest that has nothing to say on this flow may have spoken elsewhere since."""
        neighbor = self.stack.neighbors.find(self.guest)
        if neighbor is not None:
            self.on_guest_found(neighbor, now)
        else:
            self.stack.seek(self, now)

    def on_guest_found(self, neighbor: Neighbor, now: float) -> None:
        """Somebody is at our guest's address; if it is our guest, go on with it there, and at once."""
        if neighbor.mac != self.mac or self.state == CLOSED:
            return
        self.move_to(neighbor.link)
        if self.state != TIME_WAIT:
            self._keepalive_probes = 0
            self.heard_at = min(self.heard_at, now - KEEPALIVE_IDLE)  # ask it at once: it may have forgotten us
            self.idle_at = now
            if self.rtx_at != NEVER:
                self.rtx_at = now
            self._arm()

    def send_late_ack(self) -> None:
        """Nothing took the ACK along."""
        self.ack_listed = False
        if self.ack_due and self.state != CLOSED:
            tcp_output.send_ack(self)

    def endpoints(self) -> tuple[str, str]:
        """The guest's and the peer's end, for people."""
        return format_endpoint(self.guest, self.guest_port), format_endpoint(self.peer, self.peer_port)

    # ---- timers and readiness --------------------------------------------------------------------------------------

    def on_timer(self, now: float) -> None:
        """The earlier of rtx_at and idle_at has come, or had come when it was armed."""
        if self.state == CLOSED:  # the host takes nothing any more, see _linger
            self.stack.counters.drop("tcp_host_stuck")
            self.drop()
            return
        if self.link_lost:
            self._find_guest(now)
        if self.rtx_at <= now:
            self.rtx_at = NEVER
            if self.state == SYN_SENT:
                tcp_output.on_handshake_timeout(self, now, tcp_output.send_syn)
                self._watch_caller()
            elif self.state == SYN_RECEIVED:
                tcp_output.on_handshake_timeout(self, now, tcp_output.send_syn_ack)
            else:
                tcp_output.on_retransmit_timeout(self, now)
            if self.state == CLOSED:
                return
        if self.idle_at <= now:
            if self.state == TIME_WAIT:
                self._close(now, "closed")
                return
            self._on_idle(now)
            if self.state == CLOSED:
                return
        self._arm()

    def _watch_caller(self) -> None:
        """The guest does not answer at once: the caller may give up. Its reset is reported without being asked for.

        Most guests answer within a millisecond, and for those this would be one system call more.
        """
        with contextlib.suppress(OSError):  # the poller's own limits: then it is not noticed
            self._watch(0)

    def _on_idle(self, now: float) -> None:
        """Keep-alive (RFC 9293 3.8.4): is the guest still there?"""
        if self.heard_at > self._asked_at:
            self._keepalive_probes = 0
        if self.heard_at + KEEPALIVE_IDLE > now and not self._keepalive_probes:
            self.idle_at = _coarse(self.heard_at + KEEPALIVE_IDLE)
            return
        if self._keepalive_probes >= KEEPALIVE_PROBES:
            self.abort(now, "guest silent", tell_guest=True)
            return
        self._keepalive_probes += 1
        self._asked_at = now
        tcp_output.send_probe(self)
        self.idle_at = now + KEEPALIVE_INTERVAL

    def _arm(self) -> None:
        at = min(self.rtx_at, self.idle_at)
        if at < self.timer_at:
            self.stack.timers.arm(self, at)

    def arm_retransmission(self, at: float) -> None:
        """Set rtx_at; the heap is touched only when this is earlier than what is armed."""
        self.rtx_at = at
        if at < self.timer_at:
            self.stack.timers.arm(self, at)

    def _watch(self, events: int) -> None:
        if self.sock is None:
            return
        if self.interest < 0:
            self.stack.poller.register(self.fd, self, events)
        elif self.interest != events:
            self.stack.poller.modify(self.fd, events)
        self.interest = events

    def _unwatch(self) -> None:
        if self.interest >= 0:
            self.stack.poller.unregister(self.fd)
            self.interest = -1

    def want_readable(self, wanted: bool) -> None:
        """Ask the poller for READABLE, or not: a stalled flow is pumped by the guest's ACKs."""
        now = max(self.interest, 0)
        events = now | READABLE if wanted else now & ~READABLE
        if events != self.interest:
            self._watch(events)
