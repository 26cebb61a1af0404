"""Addresses, routes and links of this process's network namespace: as much of rtnetlink(7) as a guest's set-up needs.

Standard library only: `netstack exec` uses it in a process that has just been forked. A message is a header (length,
type, flags, sequence number, sender), a structure of its family, and attributes (length, type, value, padded to four
bytes); the kernel answers each with an errno. Sources: include/uapi/linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h.
"""

from __future__ import annotations

import os
import socket
import struct

_NLMSG = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, which flags are meant
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, destination and source length, TOS, table, protocol, scope, type, flags

_NLMSG_ERROR = 2
_RTM_NEWLINK = 16
_RTM_NEWADDR = 20
_RTM_NEWROUTE = 24
_REQUEST_ACK = 0x01 | 0x04
_CREATE_REPLACE = 0x400 | 0x100

_IFF_UP = 1
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFA_BROADCAST = 4
_IFA_F_NODAD = 0x02
_IFA_F_PERMANENT = 0x80
_RTA_OIF = 4
_RTA_GATEWAY = 5
_RT_TABLE_MAIN = 254
_RTPROT_STATIC = 4
_RTN_UNICAST = 1


def bring_up(device: str) -> None:
    """Set a device up. Raises OSError, as all here do."""
    _call(_RTM_NEWLINK, 0, _IFINFO.pack(0, 0, socket.if_nametoindex(device), _IFF_UP, _IFF_UP))


def add_address(device: str, address: bytes, length: int, broadcast: bytes = b"") -> None:
    """Give a device an address of either family, usable at once: duplicates are not looked for."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    flags = _IFA_F_PERMANENT | (_IFA_F_NODAD if family == socket.AF_INET6 else 0)
    body = _IFADDR.pack(family, length, flags, 0, socket.if_nametoindex(device))
    body += _attribute(_IFA_LOCAL, address) + _attribute(_IFA_ADDRESS, address)
    if broadcast:
        body += _attribute(_IFA_BROADCAST, broadcast)
    _call(_RTM_NEWADDR, _CREATE_REPLACE, body)


def add_default_route(device: str, gateway: bytes) -> None:
    """Send what has no other way through this gateway."""
    family = socket.AF_INET if len(gateway) == 4 else socket.AF_INET6
    body = _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, 0, _RTN_UNICAST, 0)
    body += _attribute(_RTA_GATEWAY, gateway)
    body += _attribute(_RTA_OIF, struct.pack("=I", socket.if_nametoindex(device)))
    _call(_RTM_NEWROUTE, _CREATE_REPLACE, body)


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _call(kind: int, flags: int, body: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.bind((0, 0))
        sock.send(_NLMSG.pack(_NLMSG.size + len(body), kind, _REQUEST_ACK | flags, 1, 0) + body)
        answer = sock.recv(65536)
    _, answered, _, _, _ = _NLMSG.unpack_from(answer)
    (code,) = struct.unpack_from("=i", answer, _NLMSG.size)
    if answered != _NLMSG_ERROR or code:
        raise OSError(-code, os.strerror(-code))
