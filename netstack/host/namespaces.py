"""Why this host does not let us make namespaces or taps, in words that say what to change.

The kernel says EPERM, ENOSPC or EACCES. Which of its many gates was closed is found by looking at each:
user_namespaces(7), namespaces(7); kernel.unprivileged_userns_clone is Debian's, the AppArmor restriction Ubuntu's
(since 23.10), where a user namespace can be made but gives no capabilities.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_KINDS = {"user": "user", "mnt": "mount", "net": "network"}
_SECCOMP_FILTER = "2"  # proc(5), Seccomp: of /proc/PID/status


def explain_refusal(code: int, step: str, *, proc: Path = Path("/proc")) -> str:
    """One line: what failed, what forbids it, what to do. `code` is the errno of `step`."""
    gates = find_gates(code, proc=proc)
    words = f"{step}: {os.strerror(code)}"
    if "/dev/net/tun" in step:
        gates = ["load its module, modprobe tun; or give it to this container: --device /dev/net/tun"]
    elif not gates and code == errno.EPERM:
        gates = ["something forbids it to this user: a security module or a container; run netstack as root"]
    return "; ".join((words, *gates))


def find_gates(code: int = errno.EPERM, *, proc: Path = Path("/proc"), root: bool | None = None) -> list[str]:
    """The settings of this host that forbid namespaces to this process, each with what to do."""
    root = os.geteuid() == 0 if root is None else root
    gates = []
    for name, kind in _KINDS.items():
        variable = f"user.max_{name}_namespaces"
        if _read(proc, variable) == "0":
            gates.append(f"{variable} is 0: no {kind} namespaces; sysctl -w {variable}=10000")
    if not gates and code == errno.ENOSPC:
        gates.append("there are as many namespaces as user.max_user_namespaces and its like allow; raise them")
    if not root and _read(proc, "kernel.unprivileged_userns_clone") == "0":
        gates.append(
            "kernel.unprivileged_userns_clone is 0: only root makes user namespaces; "
            "sysctl -w kernel.unprivileged_userns_clone=1"
        )
    if not root and _read(proc, "kernel.apparmor_restrict_unprivileged_userns") == "1":
        gates.append(
            "kernel.apparmor_restrict_unprivileged_userns is 1: AppArmor takes all rights from user namespaces; "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give this Python a profile with `userns,`"
        )
    if not gates and code == errno.EPERM and _is_filtered(proc):
        gates.append(
            "a seccomp filter is in force, as in containers: "
            "allow unshare and mount in it (--security-opt seccomp=unconfined)"
        )
    return gates


def _read(proc: Path, variable: str) -> str:
    try:
        return (proc / "sys" / variable.replace(".", "/")).read_text().strip()
    except OSError:  # not on this kernel
        return ""


def _is_filtered(proc: Path) -> bool:
    try:
        status = (proc / "self/status").read_text()
    except OSError:
        return False
    return any(line.split() == ["Seccomp:", _SECCOMP_FILTER] for line in status.splitlines())
