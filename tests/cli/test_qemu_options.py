"""QEMU command lines: what is added, and how KVM is taken out."""

from __future__ import annotations

import shlex

import pytest

from netstack.cli.qemu_options import (
    network_options,
    parse_version,
    shareable_memory,
    vhost_user_options,
    virtio_device,
    wants_kvm,
    with_kvm,
    without_kvm,
)


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


def test_the_network_card_in_shared_memory() -> None:
    line = ["qemu-system-x86_64", "-m", "1G"]
    options = vhost_user_options(line, "/tmp/a,b/s", "1G", mac=None, host_mtu=1500)
    assert options == [
        *("-object", "memory-backend-memfd,id=netstack-memory,share=on,size=1G"),
        *("-machine", "memory-backend=netstack-memory"),
        *("-chardev", "socket,id=netstack0,path=/tmp/a,,b/s"),
        *("-netdev", "vhost-user,id=netstack0,chardev=netstack0"),
        "-device",
        "virtio-net-pci,netdev=netstack0,host_mtu=1500,rx_queue_size=1024,tx_queue_size=1024,vectors=0",
    ]
    with_mac = vhost_user_options([*line, "-enable-kvm"], "/s", "1G", mac="02::1", host_mtu=1500)
    assert with_mac[-1].endswith("tx_queue_size=1024,mac=02::1"), "with KVM MSI-X works"


@pytest.mark.parametrize(
    ("line", "size"),
    (
        ("qemu-system-x86_64 -m 1G", "1G"),
        ("/usr/bin/qemu-system-aarch64 -M virt -m 512", "512M"),
        ("qemu-system-x86_64", "128M"),
        ("kvm -m size=2g", "2g"),
        ("qemu-system-x86_64 -m 1G --m 2048", "2048M"),
        ("qemu-system-x86_64 -m 1.5G", None),
        ("qemu-system-x86_64 -m 1G,slots=2,maxmem=4G", None),
        ("qemu-system-x86_64 -m 0", None),
        ("qemu-system-x86_64 -m 1G -numa node", None),
        ("qemu-system-x86_64 -m 1G -mem-path /dev/hugepages", None),
        ("qemu-system-x86_64 -m 1G -object memory-backend-ram,id=x,size=1G", None),
        ("qemu-system-x86_64 -m 1G -machine q35,memory-backend=x", None),
        ("qemu-system-x86_64 -M microvm", None),
        ("qemu-system-x86_64 -M none", None),
        ("qemu-system-s390x -m 1G", None),
        ("qemu-system-ppc -m 1G", None),
        ("qemu-system-x86_64 -readconfig vm.cfg", None),
    ),
)
def test_memory_that_can_be_shared(line: str, size: str | None) -> None:
    assert shareable_memory(line.split(), (7, 2)) == size
    assert shareable_memory(line.split(), (4, 2)) is None
    assert shareable_memory(line.split(), None) is None


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
