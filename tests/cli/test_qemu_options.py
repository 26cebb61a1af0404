"""QEMU command lines: what is added, and how KVM is taken out."""

from __future__ import annotations

import shlex

import pytest

from netstack.cli.qemu_options import network_options, parse_version, virtio_device, wants_kvm, with_kvm, without_kvm


def test_versions() -> None:
    assert parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright") == (7, 2)
    assert parse_version("QEMU emulator version 10.0.1") == (10, 0)
    assert parse_version("something else 7.2") is None


def test_the_network_card_by_version() -> None:
    line = ["qemu-system-x86_64", "-m", "1G"]
    new = network_options(line, 7, (7, 2), mac="52:54:00:00:00:01", host_mtu=1500)
    assert new == [
        "-netdev",
        "stream,id=netstack0,addr.type=fd,addr.str=7",
        "-device",
        "virtio-net-pci,netdev=netstack0,host_mtu=1500,mac=52:54:00:00:00:01",
    ]
    for version in ((7, 1), (5, 2), None):
        old = network_options(line, 7, version, mac=None, host_mtu=65520)
        assert old[1] == "socket,id=netstack0,fd=7"
        assert old[3] == "virtio-net-pci,netdev=netstack0,host_mtu=65520"


@pytest.mark.parametrize(
    ("line", "device"),
    (
        ("/usr/bin/qemu-system-x86_64 -M q35", "virtio-net-pci"),
        ("qemu-system-aarch64 -machine virt,gic-version=3", "virtio-net-pci"),
        ("qemu-system-x86_64 -M microvm,acpi=off", "virtio-net-device"),
        ("qemu-system-x86_64 --machine type=microvm", "virtio-net-device"),
        ("qemu-system-s390x -m 1G", "virtio-net-ccw"),
    ),
)
def test_the_machine_decides_on_the_card(line: str, device: str) -> None:
    assert virtio_device(line.split()) == device


# A command line; how it looks where KVM works; how it looks where it does not.
LINES = (
    ("q -m 1G -enable-kvm disk", "q -m 1G -enable-kvm disk", "q -m 1G disk -accel tcg"),
    ("q --enable-kvm", "q --enable-kvm", "q -accel tcg"),
    ("q -accel kvm", "q -accel kvm", "q -accel tcg"),
    ("q -accel kvm,dirty-ring-size=1024 -m 1G", "q -accel kvm,dirty-ring-size=1024 -m 1G", "q -m 1G -accel tcg"),
    ("q -accel auto", "q -accel kvm", "q -accel tcg"),
    ("q -accel accel=kvm -accel tcg,thread=multi", None, "q -accel tcg,thread=multi"),
    ("q -M q35,accel=kvm", "q -M q35,accel=kvm", "q -M q35 -accel tcg"),
    ("q -machine q35,accel=kvm:tcg,usb=on", None, "q -machine q35,accel=tcg,usb=on"),
    ("q -M accel=auto", "q -M accel=kvm", "q -accel tcg"),
    ("q -M q35,accel=kvm,kernel_irqchip=split", None, "q -M q35 -accel tcg"),
    ("q -machine pc,kernel-irqchip=on -accel kvm", None, "q -machine pc -accel tcg"),
    ("q -enable-kvm -cpu host,-vmx", "q -enable-kvm -cpu host,-vmx", "q -cpu max,-vmx -accel tcg"),
    ("q -enable-kvm -cpu hostile", "q -enable-kvm -cpu hostile", "q -cpu hostile -accel tcg"),
    ("q -enable-kvm -append 'accel=kvm quiet'", None, "q -append 'accel=kvm quiet' -accel tcg"),
)


@pytest.mark.parametrize(("line", "good", "bad"), LINES)
def test_kvm_in_and_out(line: str, good: str | None, bad: str) -> None:
    words = shlex.split(line)
    assert wants_kvm(words)
    if good is not None:
        assert with_kvm(words) == shlex.split(good)
    assert without_kvm(words) == shlex.split(bad)
    assert not wants_kvm(without_kvm(words))


@pytest.mark.parametrize(
    "line",
    (
        "q -m 1G",
        "q -accel tcg",
        "q -M q35,accel=tcg",
        "q -M q35",
        "q -accel",
        "q -name kvm",
        "q -append 'accel=kvm'",
        "q",
    ),
)
def test_who_does_not_ask_for_kvm_is_left_alone(line: str) -> None:
    assert not wants_kvm(shlex.split(line))
