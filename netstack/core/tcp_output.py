"""The sending half of a TCP flow: from the host's socket to the guest.

Everything here works on a `TcpFlow` and changes none of its states (see `core.tcp`, rule 1).

Theory of operation
-------------------
`pump` reads from the host what the guest's window takes, in one call, and sends it at once as segments; the bytes read
stay referenced in `flow.rtx` until acknowledged, which is the retransmission buffer. Nothing is read that cannot be
sent, so the host's own window closes when the guest's does.

What limits one read: the guest's window; SND_MAXIMUM; the budget for bytes in flight (`core.budget`), of which each
flow gets a quarter of what is left to its guest, so that 20,000 flows whose guest never acknowledges cost the budget
and not more, and leave room for other guests; the link's backlog. A flow that is held back is `stalled`: the poller is
told not to report its socket as readable, and the guest's next ACK, the link, or a timer calls `pump` again.

Loss: three duplicate ACKs, or the retransmission timer (RFC 6298), resend the segment at SND.UNA; in recovery each
partial acknowledgement resends the next two (RFC 6582), up to what had been sent when the loss was noticed.

The end of a burst, behind which nothing comes that could be acknowledged twice, is not left to the retransmission timer
and its 200 ms: when a guest falls silent for two round trips with more than a segment in flight, one segment is sent
again as a probe (RFC 8985 section 7). There the probe is the last segment, and SACK blocks tell what is missing; guests
are not offered SACK, so it is the first one, whose acknowledgement says more: everything, and it was late or the only
one lost; or exactly itself, and what follows was lost too.

A zero window is probed with an empty segment at SND.UNA - 1, as Linux does (tcp_write_wakeup): outside the guest's
window, so it must answer with an ACK and its window (RFC 9293 3.10.7.4). RFC 9293 3.8.6.1 would send a byte of data;
that byte would have to be read from the host first. Probes go on for as long as the guest answers them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from netstack.core.chunks import CHUNK
from netstack.core.timers import NEVER
from netstack.wire.tcp import ACK, FIN, PSH, SYN, write_syn_options

if TYPE_CHECKING:
    from netstack.core.tcp import TcpFlow

ECONNRESET = errno.ECONNRESET
ECONNREFUSED = errno.ECONNREFUSED
ECONNABORTED = errno.ECONNABORTED

M = 0xFFFFFFFF

# Windows toward us. A guest's SYN meets at most 65,535 (RFC 7323 2.2); the limit doubles with each batch that fills
# half of it, up to RCV_MAXIMUM. 8 MiB overflowed a tap queue of 1,000 frames and cost 25 times the throughput, 1 MiB
# did not (measured).
RCV_INITIAL = 65535
RCV_MAXIMUM = 1 << 20
RCV_SHIFT = 8  # a window of 16 MiB can be said, in steps of 256 bytes

# The most that one flow has in flight, whatever window the guest offers.
SND_MAXIMUM = 4 << 20

# How much may be read in chunks of the larger size (`core.chunks`) in one round of the poller: where several flows are
# in bulk, the others are to have their turn soon.
_AT_LARGE = 2 << 20

# Of direct receive: a turn's worth of frames of 64 KiB, which are received one by one.
_DIRECT_FRAMES = 4

# Small pieces of data that wait are put together up to this size: an entry of its own costs some 300 bytes.
MERGED = 2048

# Above this MSS a segment is worth a sendmsg() entry of its own, and copying it into a burst is not.
_BURST_MSS = 9000
_BURST_MINIMUM = 4

# RFC 6298 2.1 and 2.4: one second before the first measurement, and SHOULD NOT be below one second. Over a virtual
# wire a second is an age: Linux' TCP_RTO_MIN of 200 ms is used, which covers the guest's delayed ACKs (40 to 200 ms).
RTO_INITIAL = 1.0
_RTO_MINIMUM = 0.2
_RTO_MAXIMUM = 60.0

# Tail loss probes: none is due; the timer is that of a probe; one was sent, and nothing was acknowledged since.
NO_PROBE, PROBE_DUE, PROBE_SENT = range(3)
# RFC 8985 7.2 asks for two round trips, Linux adds two ticks of its timer (TCP_TIMEOUT_MIN, 8 ms); a guest under
# emulation may not run for 10 ms and more.
_PROBE_MINIMUM = 0.02

# RFC 9293 3.8.3: R2 at least 100 s for data, 3 minutes for a SYN. With 0.2 s doubling, 12 retries are some 7 minutes;
# with 1 s doubling, 7 SYNs are 127 s, Linux' tcp_syn_retries of 6.
_RETRIES = 12
_SYN_RETRIES = 6

# RFC 9293 3.8.6.2.1 (4): after 0.1 to 1 second even a silly window is filled.
_OVERRIDE = 0.2

# A flow that the stack's budget holds back tries again so soon; where a guest has very many of them, all together
# 10,000 times a second. (20,000 flows, each ten times a second, took more than half a processor.)
_BUDGET_RETRY = 0.1
_BUDGET_RETRY_EACH = 1e-4


def send_mss(flow: TcpFlow, offered: int | None) -> int:
    """The largest payload of a segment to this guest: its MSS option (or RFC 9293 3.7.1's default), and the link's."""
    ipv6 = flow.writer.ipv6
    mss = min(offered or (1220 if ipv6 else 536), flow.link.mtu - (60 if ipv6 else 40))
    # RFC 9293 has no lower bound; Linux's TCP_MIN_SND_MSS is 48, less would let a guest make us send header after
    # header.
    mss = max(mss, 48)
    return mss & ~3  # bursts are summed in words of four bytes


def recv_mss(flow: TcpFlow) -> int:
    """What we announce: the largest segment that the link brings us."""
    return min(flow.link.mtu, 65535) - (60 if flow.writer.ipv6 else 40)


def send_syn(flow: TcpFlow, now: float) -> None:
    """Our SYN, first or again."""
    _send_handshake(flow, SYN, 0, scale=True, now=now)


def send_syn_ack(flow: TcpFlow, now: float) -> None:
    """Our SYN-ACK, first or again."""
    _send_handshake(flow, SYN | ACK, flow.rcv_nxt, scale=flow.rcv_shift > 0, now=now)


def _send_handshake(flow: TcpFlow, flags: int, ack: int, *, scale: bool, now: float) -> None:
    options = write_syn_options(recv_mss(flow), RCV_SHIFT if scale else None)
    window = min(flow.rcv_limit, 65535)
    if flags & ACK:
        flow.rcv_adv = (flow.rcv_nxt + window) & M
    flow.writer.send(flow.iss, ack, flags, window, b"", options)
    if flow.sock is None:
        return  # the link failed under it, and took the flow along (TcpFlow.on_link_lost)
    flow.snd_nxt = (flow.iss + 1) & M
    if flow.retries == 0:
        flow.rtt_at = now
        flow.rtt_seq = flow.snd_nxt
    else:
        flow.rtt_at = 0.0  # Karn's algorithm (RFC 6298 section 3): whose answer comes now cannot be told
    flow.arm_retransmission(now + (RTO_INITIAL * (1 << flow.retries)))


def advertised_window(flow: TcpFlow) -> int:
    """RCV.WND as the field of a segment, moving rcv_adv (RFC 9293 3.8.6.2.2: not by less than a segment or half)."""
    free = flow.rcv_limit - flow.to_host_bytes
    edge = (flow.rcv_nxt + free) & M if free > 0 else flow.rcv_nxt
    gain = (edge - flow.rcv_adv) & M
    if gain < 0x80000000 and gain >= min(flow.mss, flow.rcv_limit >> 1):
        flow.rcv_adv = edge
    window = ((flow.rcv_adv - flow.rcv_nxt) & M) >> flow.rcv_shift
    return window if window < 65535 else 65535


def window_update_due(flow: TcpFlow) -> bool:
    """Whether the host took so much that the guest should hear of it."""
    edge = (flow.rcv_nxt + max(0, flow.rcv_limit - flow.to_host_bytes)) & M
    gain = (edge - flow.rcv_adv) & M
    return gain < 0x80000000 and gain >= min(2 * flow.mss, flow.rcv_limit >> 1)


def send_ack(flow: TcpFlow) -> None:
    """A pure ACK with the window of now."""
    window = advertised_window(flow)
    flow.writer.send(flow.snd_nxt, flow.rcv_nxt, ACK, window)
    flow.last_ack = flow.rcv_nxt
    flow.ack_due = False


def send_probe(flow: TcpFlow) -> None:
    """An empty segment before the guest's window: it must answer (keep-alive, RFC 9293 3.8.4; zero-window probe)."""
    flow.writer.send((flow.snd_una - 1) & M, flow.rcv_nxt, ACK, advertised_window(flow))


def send_fin(flow: TcpFlow, now: float) -> None:
    """FIN behind everything sent."""
    flow.writer.send(flow.snd_nxt, flow.rcv_nxt, FIN | ACK, advertised_window(flow))
    flow.snd_nxt = (flow.snd_nxt + 1) & M
    flow.fin_sent = True
    flow.last_ack = flow.rcv_nxt
    flow.ack_due = False
    flow.stalled = False
    if not flow.rtx:  # nothing was in flight: no retransmission was due, a probe perhaps
        flow.retries = 0
        flow.arm_retransmission(now + flow.rto)


def pump(flow: TcpFlow, now: float, *, override: bool = False) -> None:
    """Read once from the host, as much as the guest may get now, and send it; `override`: however little that is."""
    sock = flow.sock
    if sock is None or not flow.sending:
        flow.stalled = False
        return
    mss = flow.mss
    if flow.snd_wnd > flow.max_snd_wnd:
        flow.max_snd_wnd = flow.snd_wnd
    in_flight = (flow.snd_nxt - flow.snd_una) & M
    stack = flow.stack
    share = flow.shares.in_flight.room() >> 2
    space = min(flow.snd_wnd, SND_MAXIMUM, in_flight + share) - in_flight
    if space < mss and (space <= 0 or (space < flow.max_snd_wnd >> 1 and not override)):
        # Sender's silly window avoidance (RFC 9293 3.8.6.2.1). With something in flight, the ACK of it will tell.
        _stall(flow)
        if not in_flight:
            _await_window(flow, now)
        return
    link = flow.link
    if link.congested:
        _stall(flow)
        if not flow.waits_for_link:
            flow.waits_for_link = True
            link.wait_drained(flow)
        return
    unit = flow.writer.unit(mss)
    if link.direct and in_flight >= unit > mss:
        _pump_direct(flow, space, unit, now)
        return
    large = unit > _BURST_MSS and not link.direct and stack.read_at_large < _AT_LARGE
    chunks = stack.large_chunks if large else stack.chunks
    limit = min(space, chunks.size // unit * unit)
    scratch = chunks.scratch
    try:
        n = sock.recv_into(scratch, limit)
    except BlockingIOError:
        flow.stalled = False
        if not flow.interest & 1 or flow.interest < 0:
            flow.want_readable(True)
        return
    except OSError as error:
        flow.on_host_failed(now, f"host: {error.strerror}")
        return
    if n == 0:
        flow.on_host_eof(now)
        return
    if n > chunks.keep_from:
        view = chunks.keep(n)  # a copy would cost more
        if large:
            stack.read_at_large += n
    else:
        view = memoryview(bytes(scratch.data[:n]))
    _send_chunk(flow, view, n, unit, now)
    if flow.interest < 0:
        flow.stalled = True  # nobody watches the socket; the ACK of this calls us again
    elif flow.stalled and space - n >= mss:
        flow.stalled = False  # else the window is full again, and the next ACK comes here
        flow.want_readable(True)


def _pump_direct(flow: TcpFlow, space: int, unit: int, now: float) -> None:
    """Like pump(), in bulk: have the kernel put the data into the guest's own memory, and keep a copy.

    Small answers do not come here: to gather the guest's buffers for 64 KiB costs more than to copy a little.
    """
    sock = flow.sock
    assert sock is not None
    link = flow.link
    header = link.prefix + flow.writer.overhead
    for _ in range(_DIRECT_FRAMES):
        limit = min(space, unit)
        pieces = link.reserve(header, limit)
        if not pieces:  # the guest has no room
            _stall(flow)
            if not flow.waits_for_link:
                flow.waits_for_link = True
                link.wait_drained(flow)
            return
        try:
            n = sock.recvmsg_into(pieces)[0]
        except BlockingIOError:
            link.commit(b"", 0)
            flow.stalled = False
            if not flow.interest & 1 or flow.interest < 0:
                flow.want_readable(True)
            return
        except OSError as error:
            link.commit(b"", 0)
            flow.on_host_failed(now, f"host: {error.strerror}")
            return
        if n == 0:
            link.commit(b"", 0)
            flow.on_host_eof(now)
            return
        first = pieces[0]
        if n <= len(first):
            data = bytes(first[:n])
        else:
            data = b"".join(pieces if n == limit else _first(pieces, n))  # no more of it: what is kept is counted
        _send_chunk(flow, memoryview(data), n, unit, now, direct=True)
        space -= n
        if space < flow.mss or n < limit:
            break
    if flow.interest < 0:
        flow.stalled = True
    elif flow.stalled and space >= flow.mss:
        flow.stalled = False
        flow.want_readable(True)


def _first(pieces: list[memoryview], n: int) -> list[memoryview]:
    """The first n bytes of the pieces, which are longer."""
    found = []
    for piece in pieces:
        if n <= len(piece):
            found.append(piece[:n])
            break
        found.append(piece)
        n -= len(piece)
    return found


def _stall(flow: TcpFlow) -> None:
    if not flow.stalled:
        flow.stalled = True
        if flow.interest > 0:
            flow.want_readable(False)


def _await_window(flow: TcpFlow, now: float) -> None:
    """Nothing is in flight, so no ACK will come by itself: probe a closed window, or try again soon."""
    if flow.snd_wnd == 0:
        if flow.rtx_at == NEVER:
            flow.arm_retransmission(now + min(flow.rto * (1 << flow.retries), _RTO_MAXIMUM))
        return
    silly = flow.snd_wnd < min(flow.mss, flow.max_snd_wnd >> 1)
    at = now + (_OVERRIDE if silly else max(_BUDGET_RETRY, flow.stack.flows.count(flow.link) * _BUDGET_RETRY_EACH))
    if at < flow.rtx_at:  # which may be that of a probe, and a minute away
        flow.arm_retransmission(at)


def _send_chunk(flow: TcpFlow, view: memoryview, n: int, unit: int, now: float, *, direct: bool = False) -> None:
    """Send n bytes, all of them within the guest's window, as segments or as frames of up to `unit` bytes of them.

    `direct`: the link has them already (Link.reserve), as one frame.
    """
    seq = flow.snd_nxt
    mss = flow.mss
    rtx = flow.rtx
    if rtx and n < MERGED and len(rtx[-1][1]) + n <= MERGED:
        first, data = rtx[-1]
        rtx[-1] = (first, memoryview(b"".join((data, view))))
        flow.shares.in_flight.add(n)
    else:
        rtx.append((seq, view))
        flow.shares.in_flight.add(_held(view))
    flow.bytes_to_guest += n
    window = advertised_window(flow)
    ack = flow.rcv_nxt
    writer = flow.writer
    if direct:
        flow.link.commit(writer.head(seq, ack, PSH | ACK, window, n, mss), n)
    elif n <= mss:
        writer.send(seq, ack, PSH | ACK, window, view)
    elif unit > mss:
        done = 0
        while n - done > unit:
            writer.send((seq + done) & M, ack, ACK, window, view[done : done + unit], mss=mss)
            done += unit
        writer.send((seq + done) & M, ack, PSH | ACK, window, view[done:], mss=mss)
    else:
        done = 0
        k = n // mss
        if k >= _BURST_MINIMUM and mss <= _BURST_MSS:
            done = k * mss
            payload = np.frombuffer(view, dtype=np.uint8, count=done)
            flow.link.queue_burst(writer.write_burst(payload, mss, seq, ack, ACK, window))
        while n - done > mss:
            writer.send((seq + done) & M, ack, ACK, window, view[done : done + mss])
            done += mss
        if done < n:
            writer.send((seq + done) & M, ack, PSH | ACK, window, view[done:])
    flow.snd_nxt = (seq + n) & M
    flow.last_ack = ack
    flow.ack_due = False
    if flow.rtt_at == 0.0:
        flow.rtt_at = now
        flow.rtt_seq = flow.snd_nxt
    if seq == flow.snd_una:  # nothing was in flight: no retransmission was due, a probe perhaps
        flow.retries = 0
        flow.arm_retransmission(_next_retransmission(flow, now))


def _held(view: memoryview) -> int:
    """How many bytes of memory a piece keeps that waits for its acknowledgement: a large one keeps its whole chunk."""
    owner: object = view.obj
    return owner.nbytes if type(owner) is np.ndarray else len(view)


def held_bytes(flow: TcpFlow) -> int:
    """How many bytes of memory all pieces keep that wait for their acknowledgement."""
    return sum(_held(view) for _, view in flow.rtx)


def _next_retransmission(flow: TcpFlow, now: float) -> float:
    """Something was sent or acknowledged, and something is in flight: when to send again what is not acknowledged."""
    if flow.srtt and not flow.in_recovery and (flow.snd_nxt - flow.snd_una) & M > flow.mss:
        probe = max(2 * flow.srtt, _PROBE_MINIMUM)
        if probe < flow.rto:
            flow.probe = PROBE_DUE
            return now + probe
    flow.probe = NO_PROBE
    return now + flow.rto


def on_acked(flow: TcpFlow, now: float) -> None:
    """SND.UNA moved: free what it covers, measure, set the timer, go on with a recovery."""
    stack = flow.stack
    rtx = flow.rtx
    una = flow.snd_una
    if flow.snd_wnd > flow.max_snd_wnd:
        flow.max_snd_wnd = flow.snd_wnd
    freed = 0
    while rtx:
        seq, view = rtx[0]
        n = len(view)
        covered = (una - seq) & M
        if covered < n or covered >= 0x80000000:
            break
        rtx.popleft()
        chunk: object = view.obj
        if type(chunk) is np.ndarray:
            freed += chunk.nbytes
            (stack.chunks if chunk.nbytes == CHUNK else stack.large_chunks).on_acked(flow.link, chunk)
        else:
            freed += n
    flow.shares.in_flight.add(-freed)
    if flow.rtt_at and (una - flow.rtt_seq) & M < 0x80000000:
        measure_rtt(flow, now)
    if flow.retries:
        _after_timeout(flow)
        flow.retries = 0
    if una == flow.snd_nxt:
        flow.rtx_at = NEVER
        flow.in_recovery = False
        flow.probe = NO_PROBE
        return
    if flow.probe == PROBE_SENT and una == flow.resent:
        flow.in_recovery = True  # exactly the probe: what was in flight behind it has not arrived either
        flow.recover = flow.snd_nxt
    flow.rtx_at = _next_retransmission(flow, now)
    if flow.rtx_at < flow.timer_at:
        flow.arm_retransmission(flow.rtx_at)
    if flow.in_recovery:
        if (una - flow.recover) & M < 0x80000000:
            flow.in_recovery = False
        else:
            # A partial acknowledgement: the next hole (RFC 6582 3.2 step 3). Two segments, as a guest acknowledges a
            # second one at once and waits up to 200 ms for it when there is one.
            _retransmit(flow, 2)


def _after_timeout(flow: TcpFlow) -> None:
    """The guest acknowledges something after a timeout that doubled the RTO: how much of that is kept?

    RFC 6298 5.7 keeps it until the next measurement, for the case that the guest only took longer. But what is resent
    is not measured, so where much is lost the RTO would stay at a minute.
    """
    measured = _measured_rto(flow) if flow.srtt else RTO_INITIAL
    if flow.snd_una == flow.resent:
        flow.rto = measured  # exactly what was resent: it had been lost
    elif flow.rto > RTO_INITIAL:
        flow.rto = max(RTO_INITIAL, measured)


def measure_rtt(flow: TcpFlow, now: float) -> None:
    """RFC 6298 section 2; Karn's algorithm: rtt_at is 0 while what it timed was retransmitted."""
    if flow.rtt_at == 0.0:
        return
    rtt = now - flow.rtt_at
    flow.rtt_at = 0.0
    if flow.srtt == 0.0:
        flow.srtt = rtt
        flow.rttvar = rtt / 2
    else:
        flow.rttvar += (abs(flow.srtt - rtt) - flow.rttvar) / 4
        flow.srtt += (rtt - flow.srtt) / 8
    flow.rto = _measured_rto(flow)


def _measured_rto(flow: TcpFlow) -> float:
    """RFC 6298 2.2 to 2.5, with Linux' minimum."""
    return min(_RTO_MAXIMUM, max(_RTO_MINIMUM, flow.srtt + 4 * flow.rttvar))


def fast_retransmit(flow: TcpFlow, now: float) -> None:
    """Three duplicate ACKs (RFC 5681 3.2)."""
    flow.dup_acks = 0
    flow.in_recovery = True
    flow.probe = NO_PROBE
    flow.recover = flow.snd_nxt
    flow.stack.counters.tcp_fast_retransmits += 1
    _retransmit(flow)
    flow.arm_retransmission(now + flow.rto)


def on_handshake_timeout(flow: TcpFlow, now: float, resend: Callable[[TcpFlow, float], None]) -> None:
    """Nobody answered our SYN or SYN-ACK: again, up to seven times (RFC 9293 3.8.3)."""
    flow.retries += 1
    if flow.retries > _SYN_RETRIES:
        flow.abort(now, "guest did not answer", tell_guest=True, error=errno.ETIMEDOUT)
    else:
        resend(flow, now)


def on_retransmit_timeout(flow: TcpFlow, now: float) -> None:
    """RFC 6298 section 5: resend the earliest, double the timeout; a zero window likewise."""
    if flow.snd_una == flow.snd_nxt:
        _on_window_timeout(flow, now)
        return
    if flow.probe == PROBE_DUE and flow.snd_wnd:
        flow.probe = PROBE_SENT
        if not flow.link.backlog:  # else it is still on its way
            flow.stack.counters.tcp_loss_probes += 1
            flow.resent = _retransmit(flow)
        flow.arm_retransmission(now + flow.rto)
        return
    flow.probe = NO_PROBE
    if flow.snd_wnd or now - flow.heard_at > _RTO_MAXIMUM * 2:
        flow.retries += 1
    else:
        flow.retries = min(flow.retries + 1, 8)  # it answers, and has no room: that may last for ever
    if flow.retries > _RETRIES:
        flow.abort(now, "guest does not acknowledge", tell_guest=True)
        return
    flow.rtt_at = 0.0
    flow.in_recovery = True
    flow.recover = flow.snd_nxt
    flow.dup_acks = 0
    flow.stack.counters.tcp_timeouts += 1
    if flow.snd_wnd == 0:
        flow.window_shut = True
        send_probe(flow)  # it shrank its window over what is in flight; the segment itself would be dropped
        flow.arm_retransmission(now + min(flow.rto * (1 << flow.retries), _RTO_MAXIMUM))
    else:
        flow.resent = _retransmit(flow)
        # RFC 6298 5.5 and 5.7: the doubled RTO stays (_after_timeout). Otherwise a guest that takes longer than the RTO
        # would get everything twice for ever, because what was sent twice is not measured.
        flow.rto = min(flow.rto * 2, _RTO_MAXIMUM)
        flow.arm_retransmission(now + flow.rto)


def on_window_opened(flow: TcpFlow, now: float) -> None:
    """The window that was closed over what is in flight is open again.

    A guest that was out of memory may have thrown that away (Linux: tcp_prune_queue), and the timer is backed off.
    """
    flow.window_shut = False
    flow.retries = 0
    if flow.snd_una != flow.snd_nxt:
        _retransmit(flow)
        flow.arm_retransmission(now + flow.rto)


def _on_window_timeout(flow: TcpFlow, now: float) -> None:
    """Nothing in flight and something to send: the guest's window was closed, or the stack's budget was used up."""
    if not flow.stalled:
        flow.retries = 0
        return
    if flow.snd_wnd:
        pump(flow, now, override=flow.snd_wnd < min(flow.mss, flow.max_snd_wnd >> 1))
        return
    # An answer resets retries only when data is acknowledged; here any sign of life does, so that a zero window may
    # last for ever (RFC 9293 3.8.6.1), and a guest that is gone does not.
    if now - flow.heard_at < _RTO_MAXIMUM * 2:
        flow.retries = min(flow.retries + 1, 8)
    else:
        flow.retries += 1
        if flow.retries > _RETRIES:
            flow.abort(now, "guest does not open its window", tell_guest=True)
            return
    send_probe(flow)
    flow.arm_retransmission(now + min(flow.rto * (1 << flow.retries), _RTO_MAXIMUM))


def _retransmit(flow: TcpFlow, count: int = 1) -> int:
    """Resend the first segments from SND.UNA on, or FIN when only that is missing; the sequence number behind them."""
    flow.rtt_at = 0.0
    window = advertised_window(flow)
    at = flow.snd_una
    for seq, view in flow.rtx:
        skip = (at - seq) & M
        while skip < len(view):
            part = view[skip : skip + flow.mss]
            flow.writer.send(at, flow.rcv_nxt, PSH | ACK, window, part)
            flow.stack.counters.tcp_retransmits += 1
            count -= 1
            skip += len(part)
            at = (at + len(part)) & M
            if not count:
                return at
    if flow.fin_sent:
        flow.stack.counters.tcp_retransmits += 1
        flow.writer.send((flow.snd_nxt - 1) & M, flow.rcv_nxt, FIN | ACK, window)
        return flow.snd_nxt
    return at
