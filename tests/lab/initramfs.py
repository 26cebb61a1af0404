"""An initial RAM file system for test guests, made of the files of the Debian machine that runs the tests.

Theory of operation. A guest needs a kernel and a userland. The kernel is Debian's own from /boot with its modules
from /lib/modules; the userland is busybox-static, plus a few dynamic programs (iperf3, curl, dhclient, ping and the
very Python that runs the tests), each copied with the libraries that `ldd` names. Nothing is downloaded and nothing
is installed: one cpio archive of some 40 MiB is the whole machine, and it is up in about two seconds even without
KVM.

The archive is kept in a cache directory under a name made of everything that went into it, so that it is built again
when any of it changes, and only then. The same inputs give the same bytes.

Sources: Linux Documentation/driver-api/early-userspace/buffer-format.rst (the "newc" cpio format) and
Documentation/filesystems/ramfs-rootfs-initramfs.rst; depmod(8) for modules.dep.
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Where scripts/setup-debian.sh unpacks a kernel on a machine whose own boot it must not change, and where we keep ours.
UNPACKED_KERNEL = ROOT / ".cache" / "kernel"
CACHE = ROOT / ".cache" / "lab"

# What the drivers of a guest's network card need; what they depend on is added from modules.dep, and what a kernel has
# built in is left out.
MODULES = ("failover", "net_failover", "virtio_pci", "virtio_net", "af_packet", "ipv6", "virtio_rng")

# Programs beside busybox: those that the machine has are taken.
PROGRAMS = ("iperf3", "curl", "ping", "dhclient", "ip", "tracepath", "dropbear")

# Modules of Python's library that the guest's programs import (tests/lab/rootfs/probe.py).
PYTHON_MODULES = (
    *("__future__", "contextlib", "errno", "hashlib", "json", "os", "pathlib", "random", "select", "shlex", "signal"),
    *("socket", "struct", "sys", "threading", "time", "traceback", "typing"),
    *("encodings.ascii", "encodings.idna", "encodings.latin_1"),
)


class LabUnavailableError(Exception):
    """The machine lacks something without which there are no guests; the text says what, and how to get it."""


class Kernel(NamedTuple):
    """A Linux kernel on the disk of this machine."""

    version: str
    image: Path
    modules: Path


@functools.cache
def find_kernel() -> Kernel:
    """The kernel for the guests: one unpacked by the set-up, else Debian's cloud kernel, else any that can be read.

    Raises LabUnavailableError with what is missing and how to mend it.
    """
    unreadable = []
    for root in (UNPACKED_KERNEL, Path("/")):
        images = (root / "boot").glob("vmlinuz-*")
        for image in sorted(images, key=lambda image: ("-cloud-" not in image.name, image.name)):
            version = image.name.removeprefix("vmlinuz-")
            modules = root / "lib" / "modules" / version
            if not (modules / "modules.dep").is_file():
                continue
            if os.access(image, os.R_OK):
                return Kernel(version, image, modules)
            unreadable.append(image)
    if unreadable:
        raise LabUnavailableError(
            f"the kernel {unreadable[0]} can be read by root only; mend it with: sudo chmod a+r {unreadable[0]}"
        )
    raise LabUnavailableError(
        "no kernel for the guests in /boot; install one with: sudo apt-get install linux-image-cloud-amd64"
    )


class Entry(NamedTuple):
    """One member of the archive: a file on this machine's disk, or its content."""

    mode: int  # with the bits of the file type
    source: Path | None = None
    content: bytes = b""


DIRECTORY = 0o040755
FILE = 0o100644
PROGRAM = 0o100755
LINK = 0o120777


def write_cpio(entries: dict[str, bytes], modes: dict[str, int]) -> bytes:
    """A cpio archive in the "newc" format: `entries` maps each path to its content, `modes` to its mode."""
    parts: list[bytes] = []
    for number, path in enumerate(sorted(entries), start=1):
        parts.append(_write_member(path, entries[path], modes[path], number))
    parts.append(_write_member("TRAILER!!!", b"", 0, 0))
    return b"".join(parts)


def _write_member(path: str, content: bytes, mode: int, number: int) -> bytes:
    name = path.encode() + b"\0"
    #         ino   mode  uid gid nlink mtime size      devmajor/minor rdevmajor/minor namesize check
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)


class Builder:
    """Gathers the members of the archive."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._library_folders: set[str] = set()

    def add(self, path: str, entry: Entry) -> None:
        """Add one member under the absolute `path`, and the directories above it."""
        relative = path.lstrip("/")
        for parent in reversed(Path(relative).parents):
            if str(parent) != ".":
                self.entries.setdefault(str(parent), Entry(DIRECTORY))
        self.entries[relative] = entry

    def add_directory(self, path: str) -> None:
        self.add(path, Entry(DIRECTORY))

    def add_text(self, path: str, text: str, mode: int = FILE) -> None:
        self.add(path, Entry(mode, content=text.encode()))

    def add_link(self, path: str, target: str) -> None:
        self.add(path, Entry(LINK, content=target.encode()))

    def add_binary(self, source: Path, path: str | None = None) -> None:
        """Add a program or library under its own path, or another, with the libraries that it is linked to."""
        self.add(path or str(source), Entry(PROGRAM, source=source))
        self.add_libraries(source)

    def add_libraries(self, source: Path) -> None:
        """Add what a program or library is linked to."""
        for library in linked_libraries(source):
            self._library_folders.add(str(library.parent))
            self.entries.setdefault(str(library).lstrip("/"), Entry(PROGRAM, source=library))
            self.add(str(library), self.entries[str(library).lstrip("/")])

    def add_modules(self, kernel: Kernel) -> None:
        """Add the network drivers and a list of them in the order in which they load."""
        order = []
        for path in resolve_modules(kernel, MODULES):
            name = re.sub(r"\.ko(\.\w+)?$", ".ko", path.name)
            self.add(f"/lib/modules/{name}", Entry(FILE, content=read_module(path)))
            order.append(name)
        self.add_text("/lib/modules/order", "".join(f"{name}\n" for name in order))

    def add_python(self) -> None:
        """Add the Python that runs this, with the modules that the guest's programs import, compiled."""
        python = Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()
        self.add_binary(python)
        self.add_text("/usr/bin/python3", PYTHON_WRAPPER.format(home=sys.base_prefix, python=python), PROGRAM)
        listing = subprocess.run(
            [python, "-I", "-S", "-c", LIST_MODULES, *PYTHON_MODULES], check=True, capture_output=True, timeout=60
        )
        for source, compiled in json.loads(listing.stdout):
            path = Path(source)
            if path.suffix == ".py":
                cached = path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
                self.add(source, Entry(FILE, source=path))
                self.add(str(cached), Entry(FILE, content=bytes.fromhex(compiled)))
            else:
                self.add_binary(path)
        # Python finds its library by this folder; without it, it complains on every start.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.add_directory(f"{sys.base_prefix}/lib/{version}/lib-dynload")

    def add_lookups(self) -> None:
        """Add rootfs/lookup.c, compiled with musl and with this machine's C library: those compilers that there are."""
        for name, compiler, options in (("musl", "musl-gcc", ["-static"]), ("glibc", "gcc", [])):
            if shutil.which(compiler) is None:
                continue
            with tempfile.TemporaryDirectory(prefix="lookup-") as folder:
                program = Path(folder) / "lookup"
                command = [compiler, *options, "-Os", "-s", "-o", str(program), str(HERE / "rootfs" / "lookup.c")]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                self.add_libraries(program)
                self.add(f"/lab/lookup-{name}", Entry(PROGRAM, content=program.read_bytes()))

    def add_busybox(self) -> None:
        """Add busybox with a link for each of its applets, and a shell."""
        busybox = shutil.which("busybox")
        if busybox is None or linked_libraries(Path(busybox)):
            raise LabUnavailableError(
                "no static busybox on this machine; install it with: sudo apt-get install busybox-static"
            )
        self.add_binary(Path(busybox).resolve(), "/bin/busybox")
        applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True, timeout=10)
        # Debian's busybox, run as a shell, prefers its own applets to the programs in PATH: ping, ip and wget would
        # be its.
        shell = shutil.which("dash")
        if shell is not None:
            self.add_binary(Path(shell).resolve(), "/bin/sh")
        for applet in applets.stdout.split():
            if applet != "busybox" and f"bin/{applet}" not in self.entries:
                self.add_link(f"/bin/{applet}", "busybox")

    def build(self, kernel: Kernel) -> None:
        """Gather everything that a guest runs."""
        for path in ("/proc", "/sys", "/dev", "/tmp", "/run", "/root", "/var/lib/dhcp", "/etc"):
            self.add_directory(path)
        self.add_busybox()
        self.add_modules(kernel)
        for program in PROGRAMS:
            found = shutil.which(program, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            if found is not None:
                # Under one folder that is searched before busybox's, whatever the machine's own layout.
                self.add_binary(Path(found).resolve(), f"/usr/bin/{program}")
        self.add_python()
        self.add_lookups()
        for source in sorted((HERE / "rootfs").iterdir()):
            if source.is_file():
                self.add(f"/lab/{source.name}", Entry(PROGRAM, source=source))
        # Under the name by which the host's side imports it, too.
        self.add("/lab/tests/lab/rootfs/pattern.py", Entry(FILE, source=HERE / "rootfs" / "pattern.py"))
        self.add("/init", Entry(PROGRAM, source=HERE / "rootfs" / "init"))
        self.add_text("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
        self.add_text("/etc/group", "root:x:0:\n")
        self.add_text("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
        self.add_text("/etc/nsswitch.conf", "hosts: files dns\n")
        self.add_text("/etc/resolv.conf", "")
        self.add_text("/lab/library-path", ":".join(sorted(self._library_folders)))

    def fingerprint(self) -> str:
        """A name for all that goes in: paths, modes, contents; of files on the disk, their size and time instead."""
        digest = hashlib.sha256(Path(__file__).read_bytes())
        for path, entry in sorted(self.entries.items()):
            digest.update(f"{path}\0{entry.mode}\0".encode())
            if entry.source is None:
                digest.update(entry.content)
            elif entry.source.is_relative_to(HERE):
                digest.update(entry.source.read_bytes())
            else:
                status = entry.source.stat()
                digest.update(f"{entry.source}\0{status.st_size}\0{status.st_mtime_ns}".encode())
            digest.update(b"\0")
        return digest.hexdigest()[:20]

    def archive(self) -> bytes:
        """The cpio archive."""
        contents = {
            path: entry.content if entry.source is None else entry.source.read_bytes()
            for path, entry in self.entries.items()
        }
        return write_cpio(contents, {path: entry.mode for path, entry in self.entries.items()})


# -I and -S keep the machine's site-packages out; the guest has one purpose. The hash of an unchecked .pyc is never
# compared, so that no time stamp has to survive the archive.
LIST_MODULES = """
import importlib, importlib._bootstrap_external as external, json, marshal, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
found = []
for module in list(sys.modules.values()):
    path = getattr(module, "__file__", None) or getattr(getattr(module, "__spec__", None), "origin", None)
    if not path or path in ("built-in", "frozen") or module.__name__ == "__main__":
        continue
    compiled = ""
    if path.endswith(".py"):
        with open(path, "rb") as file:
            text = file.read()
        code = compile(text, path, "exec", dont_inherit=True)
        compiled = bytes(external._code_to_hash_pyc(code, bytes(8), False)).hex()
    found.append((path, compiled))
import os  # frozen in newer Pythons, but it is by this file that Python finds its library
if not any(path.endswith("/os.py") for path, _ in found):
    found.append((os.path.join(sys.base_prefix, "lib", "python%d.%d" % sys.version_info[:2], "os.py"), ""))
print(json.dumps(found))
"""

PYTHON_WRAPPER = """#!/bin/sh
PYTHONHOME={home} exec {python} -S -E -B "$@"
"""


def linked_libraries(binary: Path) -> list[Path]:
    """The shared libraries and the loader that `binary` needs, as absolute paths; none for a static program."""
    listing = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False, timeout=30)
    if listing.returncode != 0:  # "not a dynamic executable"
        return []
    paths = re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listing.stdout, flags=re.MULTILINE)
    return [Path(path) for path in paths]


def resolve_modules(kernel: Kernel, names: tuple[str, ...]) -> list[Path]:
    """Paths of the kernel modules `names` and of all that they need, each after what it needs."""
    needs: dict[str, tuple[Path, list[str]]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[module_name(path)] = (kernel.modules / path, [module_name(other) for other in rest.split()])
    built_in_list = kernel.modules / "modules.builtin"
    built_in = {module_name(line) for line in built_in_list.read_text().split()} if built_in_list.is_file() else set()
    order: list[Path] = []

    def visit(name: str) -> None:
        if name not in needs:
            # Built in under this name, or not a module of this kernel at all; a card that is missing shows soon enough.
            return
        path, others = needs[name]
        # modules.dep lists what is needed nearest first, so the farthest has to load first.
        for other in reversed(others):
            visit(other)
        if path not in order:
            order.append(path)

    for name in names:
        visit(name)
    if "virtio_net" not in built_in and "virtio_net" not in needs:
        raise LabUnavailableError(
            f"the kernel {kernel.image} has no virtio_net driver, neither built in nor as a module"
        )
    return order


def module_name(path: str) -> str:
    """The name of the kernel module at `path`: modules.dep writes some with - and the kernel all with _."""
    return re.sub(r"\.ko(\.\w+)?$", "", Path(path).name).replace("-", "_")


def read_module(path: Path) -> bytes:
    """The bytes of a module, unpacked: busybox's insmod wants it plain."""
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    if path.suffix == ".gz":
        import gzip

        return gzip.decompress(content)
    if path.suffix == ".zst":
        if shutil.which("zstd") is None:
            raise LabUnavailableError(
                "this kernel's modules are packed with zstd; install it: sudo apt-get install zstd"
            )
        return subprocess.run(["zstd", "-dcq", path], check=True, capture_output=True, timeout=30).stdout
    return content


def build_initramfs(kernel: Kernel | None = None, folder: Path = CACHE) -> Path:
    """The path of an archive for `kernel` (default: find_kernel()), built when the cache has none like it.

    Raises LabUnavailableError with what is missing and how to mend it.
    """
    builder = Builder()
    builder.build(kernel or find_kernel())
    path = folder / f"initramfs-{builder.fingerprint()}.cpio"
    if path.is_file():
        path.touch()  # newest: the last to be thrown away
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Several test runs may build at once: each writes its own file, and the last rename wins with the same bytes.
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(builder.archive())
    Path(file.name).rename(path)
    for old in sorted(folder.glob("initramfs-*.cpio"), key=lambda old: old.stat().st_mtime)[:-3]:
        old.unlink(missing_ok=True)
    return path


if __name__ == "__main__":
    print(build_initramfs())
