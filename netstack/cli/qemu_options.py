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
