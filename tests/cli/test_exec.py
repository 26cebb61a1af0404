"""`netstack exec`: a command behind a network of its own, as root and as an ordinary user.

The commands here speak with the gateway alone, which is this machine's loopback.
"""

from __future__ import annotations

import hashlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netstack.host.namespaces import explain_refusal, find_gates
from tests.cli.programs import SECONDS, environment, netstack

pytestmark = [pytest.mark.timeout(60), pytest.mark.needs("netns", "tun")]

# As root there are two ways, with a user namespace and without one.
WHO = ("root", "user") if os.geteuid() == 0 else ("user",)
_USER = 65534

# Writes a line when it is ready, and one for each signal; ends at SIGTERM, with status 3.
# It writes without a buffer: a signal may come while it still says that it is listening.
LISTENER = """
import os, signal, sys, time
def on_signal(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    if number == signal.SIGTERM: sys.exit(3)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, on_signal)
os.write(1, b"listening\\n")
while True: time.sleep(60)
"""


@pytest.fixture(params=WHO)
def who(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The words before a command that is to be run by this user."""
    if request.param == "root" or os.geteuid():
        return []
    # An ordinary user may not enter the folders that pytest makes for root; it needs none of them.
    return ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]


@pytest.fixture
def where(who: list[str], tmp_path: Path) -> dict[str, str]:
    return environment(tmp_path, PYTHONPATH=str(Path.cwd()), **({"XDG_RUNTIME_DIR": "", "HOME": "/"} if who else {}))


def words(who: list[str], *command: str, options: tuple[str, ...] = ()) -> list[str]:
    return [*who, sys.executable, "-m", "netstack", "exec", *options, "--", *command]


def run(who: list[str], where: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command behind netstack to its end."""
    return subprocess.run(
        words(who, *command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=where,
    )


def lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    assert process.stdout is not None
    return (line.decode().strip() for line in iter(process.stdout.readline, b""))


def test_the_status_is_the_commands(who: list[str], where: dict[str, str]) -> None:
    for body, status in (("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)):
        shown = run(who, where, "sh", "-c", body)
        assert (shown.returncode, shown.stdout, shown.stderr) == (status, "", "")


@pytest.mark.needs("ip")
def test_the_network_is_there_when_the_command_begins(who: list[str], where: dict[str, str]) -> None:
    shown = run(who, where, "sh", "-c", "ip -o addr; ip route; cat /etc/resolv.conf; id -u; cat /proc/net/if_inet6")
    assert shown.returncode == 0, shown.stderr
    for part in (
        "inet 127.0.0.1/8",
        "inet 192.168.5.15/24 brd 192.168.5.255",
        "inet6 fd00:c0a8:5::15/64",
        "default via 192.168.5.2 dev tap0",
        "nameserver 192.168.5.3\nnameserver fd00:c0a8:5::3\nsearch ",
        "\n0\n",
    ):
        assert part in shown.stdout, shown.stdout
    assert "tentative" not in shown.stdout
    # Two devices, no third address: nothing came by autoconfiguration.
    assert len([line for line in shown.stdout.splitlines() if line.endswith("tap0") and "default" not in line]) <= 2
    assert Path("/etc/resolv.conf").read_text() not in shown.stdout or "192.168.5.3" in shown.stdout


@pytest.mark.parametrize(("family", "gateway"), ((socket.AF_INET, "192.168.5.2"), (socket.AF_INET6, "fd00:c0a8:5::2")))
def test_the_hosts_loopback_is_the_gateway(
    who: list[str], where: dict[str, str], family: socket.AddressFamily, gateway: str
) -> None:
    body = "import socket,sys; s=socket.create_connection((sys.argv[1],int(sys.argv[2])),5); print(s.recv(9).decode())"
    with socket.socket(family) as listener:
        listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        listener.listen()
        listener.settimeout(SECONDS)

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"welcome")

        thread = threading.Thread(target=greet)
        thread.start()
        shown = run(who, where, sys.executable, "-c", body, gateway, str(listener.getsockname()[1]))
        thread.join()
    assert (shown.stdout, shown.stderr) == ("welcome\n", "")


@pytest.mark.needs("ping")
def test_ping_works_and_no_root_is_needed(who: list[str], where: dict[str, str]) -> None:
    shown = run(who, where, "sh", "-c", "ping -c1 -W5 192.168.5.2 && ping -c1 -W5 fd00:c0a8:5::2")
    assert shown.returncode == 0, shown.stdout + shown.stderr


def test_what_the_command_wrote_last_arrives(who: list[str], where: dict[str, str]) -> None:
    """It ends at once; its kernel has not sent the half of it, and the reader takes its time."""
    size = 4 << 20
    body = (
        "import os,socket,sys; s=socket.create_connection(('192.168.5.2',int(sys.argv[1]))); "
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8<<20); s.sendall(bytes(range(256))*16384); os._exit(0)"
    )
    digest = hashlib.sha256()
    received = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        port = str(listener.getsockname()[1])
        process = subprocess.Popen(words(who, sys.executable, "-c", body, port), env=where)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(SECONDS)
            while data := connection.recv(1 << 16):  # an end, and not a reset
                received += len(data)
                digest.update(data)
                time.sleep(0.002)  # a reader that is slower than the writer: that is the test
        assert process.wait(SECONDS) == 0
    assert received == size
    assert digest.digest() == hashlib.sha256(bytes(range(256)) * 16384).digest()


def test_signals_reach_the_command(who: list[str], where: dict[str, str]) -> None:
    command = words(who, sys.executable, "-c", LISTENER)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=where) as process:
        said = lines(process)
        assert next(said) == "listening"
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
            process.send_signal(number)
            assert next(said) == number.name
        process.send_signal(signal.SIGTERM)
        assert next(said) == "SIGTERM"
        assert process.wait(SECONDS) == 3


def test_control_c_counts_once(who: list[str], where: dict[str, str]) -> None:
    """The terminal sends it to both processes."""
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe((command := words(who, sys.executable, "-c", LISTENER))[0], command, where)
    shown = b""
    try:
        deadline = time.monotonic() + SECONDS
        sent = 0
        while shown.count(b"SIGINT") < 2 and time.monotonic() < deadline:
            if shown.count(b"SIGINT") + (b"listening" in shown) > sent:
                os.write(terminal, b"\x03")
                sent += 1
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 4096)
        while select.select([terminal], [], [], 0.3)[0]:  # a second copy of one of them would come now
            shown += os.read(terminal, 4096)
        assert (shown.count(b"SIGINT"), sent) == (2, 2), shown
    finally:
        os.kill(pid, signal.SIGTERM)
        os.close(terminal)
        os.waitpid(pid, 0)


def test_the_command_does_not_outlive_netstack(who: list[str], where: dict[str, str]) -> None:
    body = "import os,time; print(os.getpid(), flush=True); time.sleep(60)"
    command = words(who, sys.executable, "-c", body)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=where) as process:
        command_pid = int(next(lines(process)))
        watched = os.pidfd_open(command_pid)
        process.kill()
        assert select.select([watched], [], [], SECONDS)[0]
        os.close(watched)


def test_a_file_that_cannot_be_executed(who: list[str], where: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="netstack-") as folder:
        Path(folder).chmod(0o755)  # pytest's own are closed to other users
        program = Path(folder) / "garbage"
        program.write_bytes(b"\x7fELFgarbage")
        program.chmod(0o755)
        shown = run(who, where, str(program))
    assert shown.returncode == 1
    assert shown.stderr == f"netstack: starting {program}: Exec format error\n"


@pytest.mark.parametrize(
    ("line", "words"),
    (
        ("exec -- no-such-command", "no-such-command: no such program; give its path, or install it"),
        ("exec -p 80:web -- true", "-p 80:web: "),
        ("exec --mtu 1 -- true", "--mtu 1 must be 1280 or more"),
        ("exec", "Missing argument"),
    ),
)
def test_mistakes_cost_one_line(tmp_path: Path, line: str, words: str) -> None:
    shown = netstack(tmp_path, *line.split())
    assert shown.returncode == 2
    assert words in shown.stderr
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize(("kind", "word"), (("net", "network"), ("mnt", "mount")))
def test_where_namespaces_are_forbidden_the_sysctl_is_named(
    who: list[str], where: dict[str, str], kind: str, word: str
) -> None:
    """In a user namespace of its own the limit can be set to 0 without harm to others."""
    body = f'echo 0 >/proc/sys/user/max_{kind}_namespaces && exec "$@"'
    command = [*who, "unshare", "--user", "--map-root-user", "sh", "-c", body, "sh", *words([], "true")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=where)
    assert shown.returncode == 1
    assert f"user.max_{kind}_namespaces is 0: no {word} namespaces; sysctl -w" in shown.stderr
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "code", "root", "words"),
    (
        ({"kernel/unprivileged_userns_clone": "0"}, 1, False, "kernel.unprivileged_userns_clone is 0"),
        ({"kernel/unprivileged_userns_clone": "0"}, 1, True, ""),
        ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, 1, False, "AppArmor takes all rights"),
        ({"kernel/apparmor_restrict_unprivileged_userns": "0"}, 1, False, ""),
        ({"user/max_user_namespaces": "0"}, 28, False, "user.max_user_namespaces is 0"),
        ({"user/max_user_namespaces": "5"}, 28, False, "there are as many namespaces as"),
        ({}, 1, False, ""),
    ),
)
def test_which_gate_is_closed(tmp_path: Path, files: dict[str, str], code: int, root: bool, words: str) -> None:
    for name, value in files.items():
        path = tmp_path / "sys" / name
        path.parent.mkdir(parents=True)
        path.write_text(f"{value}\n")
    gates = find_gates(code, proc=tmp_path, root=root)
    assert [words in gate for gate in gates] == ([True] if words else [])


def test_a_seccomp_filter_is_named_when_nothing_else_forbids(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Name:\tx\nSeccomp:\t2\n")
    assert "seccomp" in explain_refusal(1, "making a user namespace", proc=tmp_path)
    assert "modprobe tun" in explain_refusal(2, "opening /dev/net/tun", proc=tmp_path)


REPLACES = """
import sys
from pathlib import Path
from netstack.cli import exec_guest
from netstack.vde.namespace import unshare_all
unshare_all()
exec_guest._mount("none", Path("/"), exec_guest._MS_REC | exec_guest._MS_SLAVE)
path = Path(sys.argv[1])
exec_guest._WRITERS = (str(path.resolve().parent),)
exec_guest.replace_resolver(path, "nameserver 192.168.5.3")
for _ in range(2):
    print(path.read_text().strip(), flush=True)
    sys.stdin.readline()
print(sorted(each.name for each in path.resolve().parent.iterdir()), flush=True)
"""


def test_the_command_keeps_its_resolv_conf_when_the_host_writes_a_new_one(tmp_path: Path) -> None:
    """As systemd-resolved does it, by rename(2), which takes a mount over the file itself away."""
    folder = tmp_path / "resolve"
    folder.mkdir()
    for each in ("stub-resolv.conf", "resolv.conf", "socket"):
        (folder / each).write_text("nameserver 127.0.0.53")
    path = tmp_path / "resolv.conf"
    path.symlink_to(folder / "stub-resolv.conf")
    with subprocess.Popen(
        [sys.executable, "-c", REPLACES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        shown = lines(process)
        assert process.stdin is not None
        assert next(shown) == "nameserver 192.168.5.3"
        (folder / "new").write_text("nameserver 127.0.0.54")
        (folder / "new").replace(folder / "stub-resolv.conf")
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert next(shown) == "nameserver 192.168.5.3"
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert next(shown) == "['resolv.conf', 'stub-resolv.conf']"
    assert path.read_text() == "nameserver 127.0.0.54", "the host's is the host's"
