"""Whether KVM truly works on this host, found out by running a small guest in it.

/dev/kvm can be present and useless: a container that got the node without the rights, nested virtualisation that is
half configured, a host whose KVM has no hardware under it and emulates every instruction of an unprepared guest
(kvm_pvm does: SeaBIOS still runs, a Debian kernel does not print a line in 30 s that TCG boots in 2.5 s). QEMU then
hangs long after it was started, without a word. So the probe goes all the way: it makes a virtual machine with one
page of memory and one virtual CPU, lets it count to ten million, and looks at the clock. That runs in a child process
with a time limit, because a broken KVM_RUN cannot be left from within.

This file is run by path in that child (`python -S kvm.py /dev/kvm`), so it imports nothing of netstack.

Source: Linux Documentation/virt/kvm/api.rst; the ioctl numbers and structures are those of include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84

KVM_API_VERSION = 12  # frozen since Linux 2.6.22
KVM_EXIT_HLT = 5
# mov ecx, LOOPS; again: dec ecx; jnz again; hlt. In real mode, hence the operand size prefixes.
LOOPS = 10_000_000
PROGRAM = b"\x66\xb9" + struct.pack("<I", LOOPS) + b"\x66\x49" + b"\x75\xfc" + b"\xf4"

CODE_ADDRESS = 0x1000  # any page above the real-mode interrupt table
PAGE = 4096
# struct kvm_sregs begins with struct kvm_segment cs: u64 base, u32 limit, u16 selector, ...
SREGS_SIZE = 0x138
SEGMENT_BASE_AND_SELECTOR = ((0, "<Q"), (12, "<H"))
# struct kvm_regs: 16 general registers, rip, rflags, 8 bytes each. Bit 1 of rflags is always one.
REGS = struct.Struct("<18Q")
RFLAGS_RESERVED = 0x2
# struct kvm_run: u8 request_interrupt_window, immediate_exit, padding[6]; u32 exit_reason
EXIT_REASON = struct.Struct("<8xI")
# struct kvm_userspace_memory_region: u32 slot, flags; u64 guest_phys_addr, memory_size, userspace_addr
MEMORY_REGION = struct.Struct("<IIQQQ")

# Twenty million instructions take some 5 ms on hardware and 5 s or more when they are emulated one by one; a Python
# child starts in 15 ms, ten times that on a busy machine.
PROBE_SECONDS = 1.5


class KvmState(NamedTuple):
    """Whether KVM can be used, and if not, why and what to do about it, for people."""

    usable: bool
    reason: str
    mend: str = ""


def probe_kvm(device: str = "/dev/kvm", seconds: float = PROBE_SECONDS) -> KvmState:
    """Find out whether `device` can run a guest, within `seconds`. Never raises."""
    if not Path(device).exists():
        return KvmState(False, f"there is no {device}", "load the module kvm_intel or kvm_amd (modprobe)")
    if not os.access(device, os.R_OK | os.W_OK):
        return KvmState(False, f"no permission to open {device}", "join the group that owns it: usermod -aG kvm $USER")
    # -S: without site-packages the child starts in some 15 ms.
    command = [sys.executable, "-S", "-E", __file__, device]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return KvmState(False, f"{device} is there, but it crawls: no hardware under it", _MEND_NESTED)
    except OSError as error:
        return KvmState(False, f"the probe of {device} did not start: {error}")
    if done.returncode == 0:
        return KvmState(True, done.stdout.decode(errors="replace").strip() or "works")
    if done.returncode < 0:
        return KvmState(False, f"{device} is there, but the probe died of signal {-done.returncode}", _MEND_NESTED)
    reason = done.stdout.decode(errors="replace").strip() or f"the probe of {device} failed"
    return KvmState(False, reason, _MEND_NESTED)


_MEND_NESTED = "if this host is itself a virtual machine, turn nested virtualisation on in its hypervisor"


def run_small_guest(device: str) -> str:
    """Run PROGRAM in a fresh virtual machine; return what was shown, raise OSError saying which step failed.

    On machines other than x86-64 it stops once a virtual CPU exists: their registers differ, and no case is known
    there of a device that goes that far and cannot run.
    """
    kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    version = _step("KVM_GET_API_VERSION", kvm, KVM_GET_API_VERSION)
    if version != KVM_API_VERSION:
        raise OSError(f"{device} speaks version {version} of its interface, not {KVM_API_VERSION}")
    machine = _step("KVM_CREATE_VM", kvm, KVM_CREATE_VM)
    memory = mmap.mmap(-1, PAGE)
    memory[: len(PROGRAM)] = PROGRAM
    cpu = _step("KVM_CREATE_VCPU", machine, KVM_CREATE_VCPU)
    if platform.machine() != "x86_64":
        return "makes virtual CPUs"
    region = MEMORY_REGION.pack(0, 0, CODE_ADDRESS, PAGE, _address_of(memory))
    _step("KVM_SET_USER_MEMORY_REGION", machine, KVM_SET_USER_MEMORY_REGION, bytearray(region))
    run = mmap.mmap(cpu, _step("KVM_GET_VCPU_MMAP_SIZE", kvm, KVM_GET_VCPU_MMAP_SIZE))
    sregs = bytearray(SREGS_SIZE)
    _step("KVM_GET_SREGS", cpu, KVM_GET_SREGS, sregs)
    for offset, kind in SEGMENT_BASE_AND_SELECTOR:
        struct.pack_into(kind, sregs, offset, 0)
    _step("KVM_SET_SREGS", cpu, KVM_SET_SREGS, sregs)
    registers = REGS.pack(*[0] * 16, CODE_ADDRESS, RFLAGS_RESERVED)
    _step("KVM_SET_REGS", cpu, KVM_SET_REGS, bytearray(registers))
    _step("KVM_RUN", cpu, KVM_RUN)
    (exit_reason,) = EXIT_REASON.unpack_from(run)
    if exit_reason != KVM_EXIT_HLT:
        raise OSError(f"{device}: a guest that should halt ended with KVM exit reason {exit_reason}")
    return "runs a guest"


def _step(name: str, fd: int, request: int, argument: int | bytearray = 0) -> int:
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise OSError(f"{name} failed: {error.strerror}") from error


def _address_of(memory: mmap.mmap) -> int:
    """Where `memory` lies in this process, which the kernel wants to know."""
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _main() -> int:
    try:
        sys.stdout.write(run_small_guest(sys.argv[1]))
    except OSError as error:
        sys.stdout.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
