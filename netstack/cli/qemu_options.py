"""QEMU's command line: what `netstack qemu` adds to it, and how it takes an unusable KVM out. Pure functions.

Source: QEMU's qemu-options.hx. Options are written with one or two dashes; a value is the next argument; keys in a
value are separated by commas.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NETDEV = "netstack0"
# -netdev stream came with 7.2; older ones have -netdev socket,fd=, with the same bytes on the wire.
STREAM_SINCE = (7, 2)

# -machine memory-backend= came with 5.0.
BACKEND_SINCE = (5, 0)
MEMORY = "netstack-memory"
# What QEMU gives a machine for which nothing is asked, on these processors.
DEFAULT_MEMORY = "128M"
_SHARING = re.compile(r"-(x86_64|i386|aarch64|riscv64)$|^(qemu-)?kvm$")
# The longest that QEMU has (VIRTQUEUE_MAX_SIZE): more of a burst fits, and fewer kicks are needed.
QUEUES = "rx_queue_size=1024,tx_queue_size=1024"
# Without KVM, QEMU 7.2 ends when Linux starts a vhost-user card with MSI-X, whatever the back-end.
NO_MSIX = "vectors=0"

KVM = "kvm"
# Not one of QEMU's own accelerators: netstack's word for KVM where it works, else TCG.
AUTO = "auto"
TCG = "tcg"


def parse_version(text: str) -> tuple[int, int] | None:
    """The version in what `qemu-system-x86_64 --version` prints."""
    match = re.search(r"QEMU emulator version ([0-9]+)\.([0-9]+)", text)
    return (int(match[1]), int(match[2])) if match else None


def network_options(
    arguments: Sequence[str], fd: int, version: tuple[int, int] | None, *, mac: str | None, host_mtu: int
) -> list[str]:
    """The options that give QEMU a virtio network card whose frames come and go over the stream socket `fd`."""
    if version is not None and version >= STREAM_SINCE:
        netdev = f"stream,id={NETDEV},addr.type=fd,addr.str={fd}"
    else:
        netdev = f"socket,id={NETDEV},fd={fd}"
    # host_mtu (VIRTIO_NET_F_MTU) sets the MTU in guests whose DHCP client does not.
    device = f"{virtio_device(arguments)},netdev={NETDEV},host_mtu={host_mtu}"
    if mac is not None:
        device += f",mac={mac}"
    return ["-netdev", netdev, "-device", device]


def vhost_user_options(
    arguments: Sequence[str], path: str, memory: str, *, mac: str | None, host_mtu: int
) -> list[str]:
    """The options for a card whose frames stay in the guest's memory.

    The vhost-user back-end is at `path`; the machine's own memory is replaced by `memory` (shareable_memory()), which
    is shared.
    """
    device = f"virtio-net-pci,netdev={NETDEV},host_mtu={host_mtu},{QUEUES}"
    if not wants_kvm(arguments):
        device += f",{NO_MSIX}"
    if mac is not None:
        device += f",mac={mac}"
    return [
        *("-object", f"memory-backend-memfd,id={MEMORY},share=on,size={memory}"),
        *("-machine", f"memory-backend={MEMORY}"),
        # In a value a comma is written twice. A descriptor in place of a path will not do: QEMU does not pass
        # descriptors on over one that it inherited.
        *("-chardev", f"socket,id={NETDEV},path={path.replace(',', ',,')}"),
        *("-netdev", f"vhost-user,id={NETDEV},chardev={NETDEV}"),
        *("-device", device),
    ]


def shareable_memory(arguments: Sequence[str], version: tuple[int, int] | None) -> str | None:
    """The size of the machine's memory, where it can be shared with a vhost-user back-end; None where it cannot.

    It can where we may say what it is made of: the command line must not say so itself, nor divide it (NUMA) or leave
    room for more (slots: what is plugged in later would not be shared).
    """
    if version is None or version < BACKEND_SINCE or not _SHARING.search(PurePath(arguments[0]).name):
        return None
    names = {_name(argument) for argument in arguments[1:]}
    if names & {"numa", "mem-path", "readconfig", "xen-domid"} or virtio_device(arguments) != "virtio-net-pci":
        return None
    objects = " ".join(_values(arguments, "object"))
    machines = " ".join(_values(arguments, "machine", "M"))
    if "memory-backend" in objects or re.search(
        r"memory-backend|memory-encryption|confidential|xen|\bnone\b", machines
    ):
        return None
    size = DEFAULT_MEMORY
    for value in _values(arguments, "m"):
        for item in value.split(","):
            key, equals, text = item.rpartition("=")
            if equals and key != "size":
                return None
            size = text
    if not re.fullmatch(r"[1-9][0-9]*[KMGTkmgt]?", size):
        return None
    return size if size[-1].isalpha() else f"{size}M"


def virtio_device(arguments: Sequence[str]) -> str:
    """The virtio network card that this QEMU's machine has a bus for."""
    if PurePath(arguments[0]).name.endswith("-s390x"):
        return "virtio-net-ccw"
    for value in _values(arguments, "machine", "M"):
        if re.match(r"(type=)?microvm\b", value):
            return "virtio-net-device"
    return "virtio-net-pci"


def wants_kvm(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for KVM, or for the choice."""
    if any(_name(argument) == "enable-kvm" for argument in arguments[1:]):
        return True
    accelerators = [value.partition(",")[0].removeprefix("accel=") for value in _values(arguments, "accel")]
    for value in _values(arguments, "machine", "M"):
        accelerators += _machine_accelerators(value)
    return KVM in accelerators or AUTO in accelerators


def with_kvm(arguments: Sequence[str]) -> list[str]:
    """The command line where KVM works: `auto` means it."""
    return _rewrite(arguments, {AUTO: KVM})


def without_kvm(arguments: Sequence[str]) -> list[str]:
    """The command line where KVM does not work: every wish for it is taken out, and TCG takes its place."""
    result = _rewrite([a for a in arguments if _name(a) != "enable-kvm"], {AUTO: "", KVM: ""})
    has_accelerator = any(_machine_accelerators(value) for value in _values(result, "machine", "M"))
    if not has_accelerator and not list(_values(result, "accel")):
        result += ["-accel", TCG]
    return result


def _rewrite(arguments: Sequence[str], replace: dict[str, str]) -> list[str]:
    """Replace accelerators by others, or by nothing."""
    lost_kvm = replace.get(KVM) == ""
    result = [arguments[0]]
    rest = iter(arguments[1:])
    for argument in rest:
        name = _name(argument)
        if name not in ("accel", "machine", "M", "cpu"):
            result.append(argument)
            continue
        value = next(rest, "")
        if name == "accel":
            kind, comma, properties = value.removeprefix("accel=").partition(",")
            kind = replace.get(kind, kind)
            value = kind + comma + properties if kind else ""
        elif name == "cpu":
            # `host` exists with KVM only; `max` is the nearest that TCG has.
            value = re.sub(r"^host\b", "max", value) if lost_kvm else value
        else:
            value = _rewrite_machine(value, replace, lost_kvm)
        if value:
            result += [argument, value]
    return result


def _rewrite_machine(value: str, replace: dict[str, str], lost_kvm: bool) -> str:
    properties = []
    for item in value.split(","):
        key, _, text = item.partition("=")
        if key == "accel":
            kinds = [replace.get(kind, kind) for kind in text.split(":")]
            text = ":".join(dict.fromkeys(kind for kind in kinds if kind))
            if text:
                properties.append(f"accel={text}")
        elif not (lost_kvm and key.replace("_", "-") == "kernel-irqchip"):
            properties.append(item)
    return ",".join(properties)


def _machine_accelerators(value: str) -> list[str]:
    for item in value.split(","):
        key, _, text = item.partition("=")
        if key == "accel":
            return text.split(":")
    return []


def _values(arguments: Sequence[str], *names: str) -> list[str]:
    return [value for argument, value in pairwise(arguments[1:]) if _name(argument) in names]


def _name(argument: str) -> str:
    """The name of an option, "" for anything else."""
    match = re.fullmatch(r"--?([A-Za-z][A-Za-z-]*)", argument)
    return match[1] if match else ""
