"""Ports of the host that lead to guests: real callers, a real kernel as the guest, netstack in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab.namespaces import FAR4, FAR6, HOST4, HOST6, TapNamespace, wait_until
from tests.lab.netstack import Netstack
from tests.lab.rootfs.pattern import pattern_digest
from tests.netns.net import (
    GATEWAY4,
    GATEWAY6,
    MEGABYTE,
    PATIENCE,
    Echo,
    address4_of,
    address6_of,
    connect,
    listen,
    mac_of,
    open_socket,
    port_of,
    receive_all,
    reset,
)
from tests.netns.test_tcp import digest_of, send_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.namespaces import Namespace
    from tests.netns.net import Net

pytestmark = [pytest.mark.needs("root", "netns", "tun", "ip"), pytest.mark.timeout(60)]

GUEST4, GUEST6 = address4_of(0), address6_of(0)
LOOPBACK4, LOOPBACK6 = "127.0.0.1", "::1"

BOTH_GUESTS = pytest.mark.parametrize("address", (GUEST4, GUEST6), ids=("ipv4", "ipv6"))


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def add(net: Net, spec: str, **more: str) -> dict[str, Any]:
    """Open a forward; what the API says of it."""
    status, made = net.netstack.ask("POST", "/v1/forwards", {"spec": spec, **more})
    assert status == 201, made
    found: dict[str, Any] = made
    return found


def refusal(net: Net, spec: str, **more: str) -> tuple[int, str]:
    status, said = net.netstack.ask("POST", "/v1/forwards", {"spec": spec, **more})
    return status, said["error"]


def remove(net: Net, made: dict[str, Any]) -> None:
    status, _ = net.netstack.ask("DELETE", f"/v1/forwards/{made['id']}")
    assert status == 204


def look(net: Net, made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = net.netstack.get(f"/v1/forwards/{made['id']}")
    return found


@pytest.fixture
def forward(net: Net) -> Iterator[Any]:
    """Opens forwards, which are closed after the test."""
    made: list[dict[str, Any]] = []

    def open_forward(spec: str, **more: str) -> dict[str, Any]:
        made.append(add(net, spec, **more))
        return made[-1]

    yield open_forward
    for each in made:
        net.netstack.ask("DELETE", f"/v1/forwards/{each['id']}")


@contextlib.contextmanager
def through(
    net: Net, listener: socket.socket, port: int, *, address: str = LOOPBACK4, caller: Namespace | None = None
) -> Iterator[tuple[socket.socket, socket.socket, str]]:
    """A connection through a forward: the caller's end, the guest's end, and whom the guest sees."""
    ours = connect(caller or net.host, address, port)
    theirs, peer = listener.accept()
    theirs.settimeout(PATIENCE)
    with ours, theirs:
        yield ours, theirs, peer[0]


# ---- who is seen ----


@pytest.mark.parametrize(
    ("host", "guest_address", "caller"), ((HOST4, GUEST4, FAR4), (HOST6, GUEST6, FAR6)), ids=("ipv4", "ipv6")
)
def test_the_guest_sees_the_callers_own_address_and_port(
    net: Net, guest: TapNamespace, forward: Any, host: str, guest_address: str, caller: str
) -> None:
    with listen(guest, guest_address) as listener:
        made = forward(f"{bracketed(host)}:0:{bracketed(guest_address)}:{port_of(listener)}")
        port = made["host_port"]
        ours = connect(net.world.far, host, port)
        theirs, peer = listener.accept()
        with ours, theirs:
            assert peer[:2] == (caller, ours.getsockname()[1])
            ours.sendall(b"question")
            assert theirs.recv(100) == b"question"
            theirs.sendall(b"answer")
            assert ours.recv(100) == b"answer"


@BOTH_GUESTS
def test_a_caller_on_the_hosts_loopback_is_the_gateway(
    net: Net, guest: TapNamespace, forward: Any, address: str
) -> None:
    loopback, gateway = (LOOPBACK6, GATEWAY6) if ":" in address else (LOOPBACK4, GATEWAY4)
    with listen(guest, address) as listener:
        made = forward(f"{bracketed(loopback)}:0:{bracketed(address)}:{port_of(listener)}")
        with through(net, listener, made["host_port"], address=loopback) as (_, _, peer):
            assert peer == gateway


def test_a_forward_that_shows_the_gateway_to_the_guest(net: Net, guest: TapNamespace, forward: Any) -> None:
    with listen(guest, GUEST4) as listener:
        made = forward(f"0.0.0.0:0:{GUEST4}:{port_of(listener)}", source="gateway")
        with through(net, listener, made["host_port"], address=HOST4, caller=net.world.far) as (_, _, peer):
            assert peer == GATEWAY4


def test_both_families_through_one_port(net: Net, guest: TapNamespace, forward: Any) -> None:
    """IPv4 callers of a socket of both families are themselves to an IPv4 guest, and IPv6 callers are the gateway."""
    with listen(guest, GUEST4) as listener:
        made = forward(f"[::]:0:{GUEST4}:{port_of(listener)}")
        for address, seen in ((HOST4, FAR4), (HOST6, GATEWAY4)):
            with through(net, listener, made["host_port"], address=address, caller=net.world.far) as (_, _, peer):
                assert peer == seen


def test_callers_that_the_guest_cannot_tell_apart(net: Net, guest: TapNamespace, forward: Any) -> None:
    """Two of the host's loopback addresses may have the same port: one of them gets another."""
    with listen(guest, GUEST4) as listener:
        made = forward(f"0:{GUEST4}:{port_of(listener)}")
        peers = []
        with contextlib.ExitStack() as stack:
            for address in ("127.0.0.1", "127.0.0.2"):
                sock = stack.enter_context(open_socket(net.host, socket.AF_INET))
                sock.bind((address, 41234))
                sock.connect((LOOPBACK4, made["host_port"]))
                theirs, peer = listener.accept()
                stack.enter_context(theirs)
                peers.append(peer)
                sock.sendall(address.encode())
                assert theirs.recv(100) == address.encode()
        assert peers[0] == (GATEWAY4, 41234)
        assert peers[1][0] == GATEWAY4
        assert peers[1][1] != 41234


# ---- the stream ----


@pytest.mark.slow
@BOTH_GUESTS
def test_megabytes_each_way_and_both_at_once(net: Net, guest: TapNamespace, forward: Any, address: str) -> None:
    length = 20 * MEGABYTE
    with listen(guest, address) as listener:
        made = forward(f"0:{bracketed(address)}:{port_of(listener)}")
        with through(net, listener, made["host_port"]) as (ours, theirs, _), ThreadPoolExecutor(2) as readers:
            threads = [send_pattern(ours, length), send_pattern(theirs, length)]
            digests = [readers.submit(digest_of, sock) for sock in (ours, theirs)]
            assert {digest.result() for digest in digests} == {pattern_digest(length)}
            for thread in threads:
                thread.join()
    wait_until(lambda: look(net, made)["connections"]["open"] == 0, "the connection's end", PATIENCE)
    found = look(net, made)
    assert (found["bytes_to_guest"], found["bytes_from_guest"]) == (length, length)
    assert found["connections"] == {"open": 0, "total": 1, "refused": 0}


def test_each_side_closes_its_half_and_hears_the_other_afterwards(net: Net, guest: TapNamespace, forward: Any) -> None:
    with listen(guest, GUEST4) as listener:
        made = forward(f"0:{GUEST4}:{port_of(listener)}")
        with through(net, listener, made["host_port"]) as (ours, theirs, _):
            ours.sendall(b"question")
            ours.shutdown(socket.SHUT_WR)
            assert receive_all(theirs) == b"question"
            answering = send_pattern(theirs, MEGABYTE)
            assert digest_of(ours) == pattern_digest(MEGABYTE)
            answering.join()
        with through(net, listener, made["host_port"]) as (ours, theirs, _):
            theirs.sendall(b"greeting")
            theirs.shutdown(socket.SHUT_WR)
            assert receive_all(ours) == b"greeting"
            asking = send_pattern(ours, MEGABYTE)
            assert digest_of(theirs) == pattern_digest(MEGABYTE)
            asking.join()


def test_what_a_caller_sends_and_closes_at_once_arrives(net: Net, guest: TapNamespace, forward: Any) -> None:
    """All of it is in the kernel before the guest has been asked."""
    with listen(guest, GUEST4) as listener:
        made = forward(f"0:{GUEST4}:{port_of(listener)}")
        with connect(net.host, LOOPBACK4, made["host_port"]) as ours:
            ours.sendall(b"all I have to say")
        theirs, _ = listener.accept()
        with theirs:
            assert receive_all(theirs) == b"all I have to say"


def test_resets_go_through_in_both_directions(net: Net, guest: TapNamespace, forward: Any) -> None:
    with listen(guest, GUEST4) as listener:
        made = forward(f"0:{GUEST4}:{port_of(listener)}")
        with through(net, listener, made["host_port"]) as (ours, theirs, _):
            reset(theirs)
            with pytest.raises(ConnectionResetError):
                ours.recv(1)
        with through(net, listener, made["host_port"]) as (ours, theirs, _):
            reset(ours)
            with pytest.raises(ConnectionResetError):
                theirs.recv(1)


@pytest.mark.slow
def test_a_guest_that_does_not_read_stops_the_caller(
    net: Net, guest: TapNamespace, other: TapNamespace, forward: Any
) -> None:
    with (
        listen(guest, GUEST4) as listener,
        Echo(net, other, HOST4) as echo,
    ):
        made = forward(f"0:{GUEST4}:{port_of(listener)}")
        with through(net, listener, made["host_port"]) as (ours, theirs, _):
            before = net.netstack.memory()
            ours.setblocking(False)
            sent, quiet_since = 0, time.monotonic()
            while time.monotonic() - quiet_since < 1.0:
                try:
                    sent += ours.send(bytes(MEGABYTE))
                    quiet_since = time.monotonic()
                except BlockingIOError:
                    assert echo.median() < 0.1
            assert sent < 64 * MEGABYTE
            assert net.netstack.memory() - before < 24 * MEGABYTE
            ours.setblocking(True)
            ours.shutdown(socket.SHUT_WR)
            assert len(receive_all(theirs)) == sent


# ---- guests that do not answer ----


@BOTH_GUESTS
def test_a_closed_port_of_a_guest_is_no_empty_success(
    net: Net, guest: TapNamespace, forward: Any, address: str
) -> None:
    """Linux accepts for us; then the caller sees a reset, at once, or that nobody is there."""
    with listen(guest, address) as listener:
        port = port_of(listener)
    made = forward(f"0:{bracketed(address)}:{port}")
    begun = time.monotonic()
    with pytest.raises((ConnectionResetError, ConnectionRefusedError)):
        _connect_and_read(net, made["host_port"])
    assert time.monotonic() - begun < 1.0
    assert look(net, made)["last_error"] == f"{address} refuses port {port}: nothing listens there"
    assert look(net, made)["connections"] == {"open": 0, "total": 1, "refused": 1}


@pytest.mark.parametrize("listens_at", (GUEST4, GUEST6), ids=("ipv4", "ipv6"))
def test_a_server_that_listens_in_one_family_only(net: Net, guest: TapNamespace, listens_at: str) -> None:
    """`localhost` of a caller is ::1 first, and many servers know IPv4 only; others, IPv6 only."""
    folder = net.world.folder / f"families{len(listens_at)}"
    folder.mkdir()
    settings = folder / "n.toml"
    settings.write_text(
        '[network]\nsubnet = "192.168.5.0/24"\n'
        f'[[guest]]\nname = "web"\nmac = "{mac_of(4)}"\naddress = "{address4_of(4)}"\n'
        f'address6 = "{address6_of(4)}"\n[[publish]]\nspec = "[::]:7801:web:7"\n'
    )
    link = folder / "q.sock"
    with (
        Netstack(net.host, folder, links=[f"unix://{link}"], arguments=["-c", str(settings)]),
        TapNamespace(link, inside=net.host, mac=mac_of(4)) as web,
    ):
        web.set_addresses(f"{address4_of(4)}/24", f"{address6_of(4)}/64", gateways=(GATEWAY4, GATEWAY6))
        # From the addresses by which it is to be known: it may have made another one by now, from an advertisement.
        for gateway, address in ((GATEWAY4, address4_of(4)), (GATEWAY6, address6_of(4))):
            web.run("ping", "-c", "1", "-W", "5", "-I", address, gateway)
        with listen(web, address4_of(4) if listens_at == GUEST4 else address6_of(4), 7) as listener:
            for address, caller in (
                (LOOPBACK4, net.host),
                (LOOPBACK6, net.host),
                (HOST4, net.world.far),
                (HOST6, net.world.far),
            ):
                with through(net, listener, 7801, address=address, caller=caller) as (ours, theirs, _):
                    theirs.sendall(b"in one of them")
                    assert ours.recv(100) == b"in one of them"


@pytest.mark.slow
def test_a_guest_that_comes_later(net: Net, guest: TapNamespace, forward: Any) -> None:
    """The forward is there before the guest: callers are reset until it comes."""
    made = forward(f"0:{address4_of(9)}:7")
    with pytest.raises(ConnectionResetError), connect(net.host, LOOPBACK4, made["host_port"]) as sock:
        sock.recv(1)
    assert look(net, made)["last_error"] == f"nobody answers at {address4_of(9)}"
    with (
        net.guest(9) as late,
        listen(late, address4_of(9), 7) as listener,
        through(net, listener, made["host_port"]) as (ours, theirs, _),
    ):
        theirs.sendall(b"here I am")
        assert ours.recv(100) == b"here I am"


def test_a_caller_that_gives_up_leaves_nothing(net: Net, guest: TapNamespace, forward: Any) -> None:
    """A guest that drops our SYNs: its packet filter would, or a system that hangs."""
    guest.run("ip", "route", "add", "blackhole", GATEWAY4)
    try:
        made = forward(f"0:{GUEST4}:7")
        callers = [connect(net.host, LOOPBACK4, made["host_port"]) for _ in range(20)]
        wait_until(lambda: look(net, made)["connections"]["total"] == 20, "the callers to be accepted", PATIENCE)
        assert [flow["state"] for flow in net.flows_of(GUEST4)].count("SYN_SENT") == 20
        for caller in callers:
            reset(caller)
        wait_until(lambda: look(net, made)["connections"]["refused"] == 20, "the callers' end to be seen", PATIENCE)
        assert "SYN_SENT" not in [flow["state"] for flow in net.flows_of(GUEST4)]
    finally:
        guest.run("ip", "route", "del", "blackhole", GATEWAY4)


# ---- what can be forwarded ----


def test_a_unix_socket_leads_to_a_port_of_the_guest(net: Net, guest: TapNamespace, forward: Any) -> None:
    path: Path = net.world.folder / "forward.sock"
    with listen(guest, GUEST4) as listener:
        made = forward(f"unix:{path}:{GUEST4}:{port_of(listener)}")
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as ours:
            ours.settimeout(PATIENCE)
            ours.connect(str(path))
            theirs, peer = listener.accept()
            with theirs:
                assert peer[0] == GATEWAY4
                ours.sendall(b"over a unix socket")
                ours.shutdown(socket.SHUT_WR)
                assert receive_all(theirs) == b"over a unix socket"
                theirs.sendall(b"and back")
            assert receive_all(ours) == b"and back"
        remove(net, made)
    assert not path.exists()


def test_a_range_leads_to_a_range(net: Net, guest: TapNamespace, forward: Any) -> None:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listen(guest, GUEST4, 7100 + i)) for i in range(3)]
        made = forward(f"7200-7202:{GUEST4}:7100-7102")
        assert made["ports"] == 3
        for i, listener in enumerate(listeners):
            with through(net, listener, 7200 + i) as (ours, theirs, _):
                theirs.sendall(str(i).encode())
                assert ours.recv(10) == str(i).encode()


def test_of_a_range_all_ports_are_open_or_none(net: Net, guest: TapNamespace) -> None:
    with listen(net.host, LOOPBACK4, 7302):
        status, words = refusal(net, f"7300-7303:{GUEST4}:80-83")
    assert status == 409
    assert f"(process {os.getpid()}) has it" in words
    for port in (7300, 7301, 7303):
        with pytest.raises(ConnectionRefusedError), connect(net.host, LOOPBACK4, port):
            pass


def test_a_port_in_use_is_an_error_that_names_who_has_it(net: Net, guest: TapNamespace, forward: Any) -> None:
    with listen(net.host, "0.0.0.0") as taken:
        port = port_of(taken)
        status, words = refusal(net, f"{port}:{GUEST4}:80")
        assert status == 409
        assert words == (
            f"127.0.0.1:{port}:{GUEST4}:80: the port is in use: "
            f"{_name_of_this_process()} (process {os.getpid()}) has it; end it, or take another"
        )
    made = forward(f"{port}:{GUEST4}:80")
    status, words = refusal(net, f"0.0.0.0:{port}:{GUEST4}:81")
    assert status == 409
    assert f"the forward {made['id']} (127.0.0.1:{port}:{GUEST4}:80) has it" in words


def _connect_and_read(net: Net, port: int) -> None:
    with open_socket(net.host, socket.AF_INET) as sock:
        sock.connect((LOOPBACK4, port))
        sock.recv(1)


def _name_of_this_process() -> str:
    return Path("/proc/self/comm").read_text().strip()


def test_a_port_in_use_and_the_next_one_taken(net: Net, guest: TapNamespace, forward: Any) -> None:
    with listen(net.host, LOOPBACK4, 7400), listen(net.host, LOOPBACK4, 7402), listen(guest, GUEST4) as listener:
        assert forward(f"7400:{GUEST4}:1", on_conflict="next")["host_port"] == 7401
        made = forward(f"7400:{GUEST4}:{port_of(listener)}", on_conflict="next")
        assert made["host_port"] == 7403
        with through(net, listener, 7403):
            pass


def test_a_port_in_use_and_a_loopback_address_of_the_guests_own(net: Net, guest: TapNamespace, forward: Any) -> None:
    with listen(net.host, LOOPBACK4, 7500), listen(guest, GUEST4) as listener:
        made = forward(f"7500:{GUEST4}:{port_of(listener)}", on_conflict="loopback")
        assert made["spec"] == f"127.0.5.20:7500:{GUEST4}:{port_of(listener)}"
        with through(net, listener, 7500, address="127.0.5.20"):
            pass


@pytest.mark.parametrize(
    ("spec", "status", "words"),
    (
        ("80", 400, "which port of the host?"),
        ("8080:192.168.9.9:80", 400, "no guest's address in 192.168.5.0/24"),
        (f"8080:{GATEWAY4}:80", 400, "the gateway's own address"),
        ("203.0.113.200:8080:80", 400, "the host does not have this address"),
        ("unix:/nowhere/at/all.sock:80", 400, "its directory is not there"),
        ("unix:/etc/hosts:80", 409, "a file that is no socket is there"),
    ),
)
def test_what_cannot_be_is_said_in_a_line(net: Net, guest: TapNamespace, spec: str, status: int, words: str) -> None:
    found, said = refusal(net, spec)
    assert found == status
    assert words in said
    assert "\n" not in said


# ---- coming and going ----


def test_a_forward_that_is_removed_keeps_what_is_open(net: Net, guest: TapNamespace, forward: Any) -> None:
    with listen(guest, GUEST4) as listener:
        made = forward(f"0:{GUEST4}:{port_of(listener)}")
        with through(net, listener, made["host_port"]) as (ours, theirs, _):
            remove(net, made)
            with pytest.raises(ConnectionRefusedError), connect(net.host, LOOPBACK4, made["host_port"]):
                pass
            ours.sendall(b"still here")
            assert theirs.recv(100) == b"still here"


@pytest.mark.slow
def test_two_hundred_forwards_come_and_go_under_load(
    net: Net, guest: TapNamespace, other: TapNamespace, forward: Any
) -> None:
    """A transfer through one forward and a conversation of another guest, while the table of forwards changes."""
    length = 64 * MEGABYTE
    with (
        listen(guest, GUEST4) as listener,
        listen(guest, GUEST4, backlog=1024) as server,
        Echo(net, other, HOST4) as echo,
        ThreadPoolExecutor(3) as pool,
    ):
        made = forward(f"0:{GUEST4}:{port_of(listener)}")
        before = len(net.netstack.get("/v1/forwards")["forwards"])
        with through(net, listener, made["host_port"]) as (ours, theirs, _):
            sending = send_pattern(ours, length)
            digest = pool.submit(digest_of, theirs)
            mine = [add(net, f"0:{GUEST4}:{port_of(server)}") for _ in range(100)]
            for each in mine:
                with through(net, server, each["host_port"]) as (caller, answering, _):
                    answering.sendall(each["id"].encode())
                    assert caller.recv(100) == each["id"].encode()
                remove(net, each)
                mine[mine.index(each)] = add(net, f"{each['host_port']}:{GUEST4}:{port_of(server)}")
            assert echo.median() < 0.2
            for each in mine:
                remove(net, each)
            assert digest.result() == pattern_digest(length)
            sending.join()
        assert len(net.netstack.get("/v1/forwards")["forwards"]) == before


def test_a_thousand_ports_are_open_at_once(net: Net, guest: TapNamespace, forward: Any) -> None:
    with listen(guest, GUEST4, 20999) as listener:
        begun = time.monotonic()
        made = forward(f"20000-20999:{GUEST4}:20000-20999")
        assert time.monotonic() - begun < 2.0
        with through(net, listener, 20999):
            pass
        remove(net, made)


@pytest.mark.slow
def test_forwards_of_the_settings_and_a_reload(net: Net, guest: TapNamespace) -> None:
    """By name: the guest of the settings; SIGHUP takes over what changed and leaves alone what did not."""
    folder = net.world.folder / "reload"
    folder.mkdir()
    settings = folder / "n.toml"

    def write(*specs: str) -> None:
        text = '[network]\nsubnet = "192.168.5.0/24"\n'
        text += f'[[guest]]\nname = "web"\nmac = "{mac_of(3)}"\naddress = "{address4_of(3)}"\n'
        settings.write_text(text + "".join(f'[[publish]]\nspec = "{spec}"\n' for spec in specs))

    write("7601:web:7", "7602:web:7")
    link = folder / "q.sock"
    arguments = ["-c", str(settings), "-p", "7603:web:7"]
    with (
        Netstack(net.host, folder, links=[f"unix://{link}"], arguments=arguments) as second,
        TapNamespace(link, inside=net.host, mac=mac_of(3)) as web,
    ):
        web.set_addresses(f"{address4_of(3)}/24", gateways=(GATEWAY4,))
        assert second.process is not None
        with listen(web, address4_of(3), 7) as listener:
            for port in (7601, 7602, 7603):
                with through(net, listener, port):
                    pass
            with through(net, listener, 7602) as (ours, theirs, _):
                write("7602:web:7", "7604:web:7")
                second.process.send_signal(signal.SIGHUP)
                wait_until(lambda: "settings read again" in second.log, "the reload", PATIENCE)
                with pytest.raises(ConnectionRefusedError), connect(net.host, LOOPBACK4, 7601):
                    pass
                for port in (7602, 7603, 7604):
                    with through(net, listener, port):
                        pass
                ours.sendall(b"undisturbed")
                assert theirs.recv(100) == b"undisturbed"
        ids = {each["host_port"]: each["id"] for each in second.get("/v1/forwards")["forwards"]}
        assert ids[7602] == "f2"


def test_a_forward_cannot_be_made_at_the_start(net: Net) -> None:
    """Then netstack does not start, and says why."""
    folder = net.world.folder / "refused"
    with listen(net.host, LOOPBACK4, 7700):
        second = Netstack(net.host, folder, links=[f"unix://{folder}/q.sock"], arguments=["-p", "7700:80"])
        with pytest.raises(RuntimeError, match=r"netstack: 127\.0\.0\.1:7700:80: the port is in use: .*process \d+"):
            second.start()


def test_callers_wait_while_a_forward_is_full(net: Net, guest: TapNamespace, forward: Any) -> None:
    """No more than so many connections wait for the guest's answer; the others wait in the kernel, and get theirs."""
    count = 300
    with listen(guest, GUEST4, backlog=count) as listener:
        made = forward(f"0:{GUEST4}:{port_of(listener)}")
        guest.run("ip", "route", "add", "blackhole", GATEWAY4)
        try:
            callers = [connect(net.host, LOOPBACK4, made["host_port"]) for _ in range(count)]
            wait_until(lambda: look(net, made)["connections"]["total"] == 128, "the bound to be reached", PATIENCE)
        finally:
            guest.run("ip", "route", "del", "blackhole", GATEWAY4)
        accepted = [listener.accept()[0] for _ in range(count)]
        for sock in (*callers, *accepted):
            sock.close()
    assert look(net, made)["connections"]["total"] == count
