"""What a host's errno is called on the wire: the ICMP error that a router would have sent to the guest."""

from __future__ import annotations

import errno

from netstack.wire.icmp import HOST_UNREACHABLE, NO_ROUTE, PROHIBITED, Problem

# connect() of a TCP flow. What is not here is answered with RST: refused, reset, and what only concerns the host itself
# (no descriptors, no ports, no memory).
TCP_PROBLEMS: dict[int, Problem] = {
    errno.EHOSTUNREACH: HOST_UNREACHABLE,
    errno.EHOSTDOWN: HOST_UNREACHABLE,
    errno.ETIMEDOUT: HOST_UNREACHABLE,
    errno.ENETUNREACH: NO_ROUTE,
    errno.ENETDOWN: NO_ROUTE,
    errno.EAFNOSUPPORT: NO_ROUTE,  # the host has no IPv6
    errno.EPERM: PROHIBITED,  # the host's packet filter
    errno.EACCES: PROHIBITED,  # a "prohibit" route
}

# The host itself has no more of what a connection takes: descriptors, memory, ports toward that peer.
EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL))
