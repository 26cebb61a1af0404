"""The gateway's proxy with everything real: Linux as the guest, curl, wget and apt in it, the host's proxies, TLS.

    guest (a namespace behind a tap)  --netstack-->  host: squid, tinyproxy, microsocks, proxy.py on its loopback
                                                     far:  web.test, 203.0.113.1, ports 80 and 443

The host's settings are the `[proxy]` table, and change by SIGHUP while netstack runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest
import trustme

from tests.lab.namespaces import FAR4, FAR6, wait_until
from tests.lab.proxies import Microsocks, ProxyPy, Tinyproxy
from tests.netns.net import (
    GATEWAY4,
    GATEWAY6,
    PATIENCE,
    address4_of,
    connect,
    datagrams,
    listen,
    port_of,
    receive_all,
    reset,
)
from tests.netns.proxy_lab import PROXY, SECRET, SQUID, Lab

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs("root", "netns", "ip", "tun", "curl"), pytest.mark.slow]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        yield Lab(stack)


@pytest.fixture(autouse=True)
def healthy(lab: Lab) -> Iterator[None]:
    """Whatever a test did: netstack runs, without an error of its own, and told nobody the password."""
    yield
    assert lab.netstack.process is not None
    assert lab.netstack.process.poll() is None, lab.netstack.log
    status = lab.netstack.status()
    assert "internal_error" not in status["drops"] and not lab.count("proxy_internal_error"), lab.netstack.log
    assert "Traceback" not in lab.netstack.log
    for text in (lab.netstack.log, json.dumps(lab.netstack.get("/v1/proxy")), json.dumps(status)):
        assert SECRET not in text
        assert "dXNlcjpnRWhlMW0" not in text  # in Base64


# ---- a guest that knows of the proxy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ("http://web.test/a", "https://web.test/a"))
def test_curl_reaches_the_web_through_squid_with_the_hosts_credentials(lab: Lab, url: str) -> None:
    lab.set_proxy(SQUID)
    before = len(lab.squid.log)
    found = lab.ask("--proxy", PROXY, url)
    assert found["path"] == "/a"
    assert "Proxy-Authorization" not in found["headers"]
    line = wait_until(lambda: lab.squid.log[before:], "squid logs it")
    assert " user " in line
    assert ("CONNECT web.test:443" if url.startswith("https") else "GET http://web.test/a") in line


@pytest.mark.needs("wget")
def test_wget_reads_the_variables_that_the_gateway_hands_out(lab: Lab) -> None:
    lab.set_proxy(SQUID)
    before = lab.count("proxy_forwarded")
    script = (
        f"eval \"$(wget -qO- http://{GATEWAY4}/proxy.env | sed 's/^/export /; s/export export/export/')\"; "
        f"wget -qO- http://web.test/w && wget -qO- --ca-certificate={lab.web.authority} https://web.test/v"
    )
    output = lab.guest.run("sh", "-c", script).stdout
    assert '"path": "/w"' in output and '"path": "/v"' in output
    assert lab.count("proxy_forwarded") == before + 2


@pytest.mark.needs("apt-get", "dpkg-deb")
@pytest.mark.parametrize("knowing", (True, False))
def test_apt_fetches_a_package(lab: Lab, tmp_path: Path, knowing: bool) -> None:
    lab.set_proxy(SQUID)
    package = tmp_path / "package"
    (package / "DEBIAN").mkdir(parents=True)
    control = "Package: lab-hello\nVersion: 1\nArchitecture: all\nMaintainer: lab <lab@web.test>\nDescription: hello\n"
    (package / "DEBIAN/control").write_text(control)
    site = lab.web.folder / "debian"
    site.mkdir(exist_ok=True)
    file = site / "lab-hello_1_all.deb"
    lab.guest.run("dpkg-deb", "--root-owner-group", "-b", package, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    facts = f"Filename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n"
    (site / "Packages").write_text(control + facts)
    root = tmp_path / "apt"
    for name in ("lists/partial", "cache/archives/partial", "etc"):
        (root / name).mkdir(parents=True)
    (root / "status").touch()
    (root / "etc/list").write_text("deb [trusted=yes] http://web.test/debian ./\n")
    options = {
        "Dir::State::Lists": root / "lists",
        "Dir::State::status": root / "status",
        "Dir::Cache": root / "cache",
        "Dir::Etc::SourceList": root / "etc/list",
        "Dir::Etc::SourceParts": "/dev/null",
        "APT::Sandbox::User": "root",
        "Acquire::http::Proxy": PROXY if knowing else "DIRECT",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    before = len(lab.squid.log)
    lab.guest.run("apt-get", *words, "update", timeout=60)
    lab.guest.run("sh", "-c", 'cd "$0" && exec apt-get "$@"', tmp_path, *words, "download", "lab-hello", timeout=60)
    assert hashlib.sha256((tmp_path / file.name).read_bytes()).hexdigest() == digest
    log = wait_until(lambda: lab.squid.log[before:] if ".deb" in lab.squid.log[before:] else "", "squid logs it")
    assert "/200 " in log and f"GET http://web.test/debian/./{file.name} user" in log


def test_a_body_of_many_megabytes_goes_up_and_comes_down(lab: Lab) -> None:
    lab.set_proxy(SQUID)
    big = lab.folder / "big"
    big.write_bytes(bytes(20_000_000))
    memory = lab.netstack.memory()
    for url in ("http://web.test/up", "https://web.test/up"):
        assert lab.ask("--proxy", PROXY, "--data-binary", f"@{big}", url)["received"] == 20_000_000
        size = lab.curl("--proxy", PROXY, "-o", "/dev/null", "-w", "%{size_download}", url[:-2] + "bytes/20000000")
        assert size.stdout == "20000000"
    assert lab.netstack.memory() < memory + (24 << 20)


def test_what_squid_forbids_is_a_page_for_http_and_an_error_for_connect(lab: Lab) -> None:
    lab.set_proxy(SQUID)
    assert "403" in lab.curl("--proxy", PROXY, "-o", "/dev/null", "-w", "%{http_code}", "http://blocked.test/").stdout
    failed = lab.curl("--proxy", PROXY, "https://blocked.test/", check=False)
    assert "response 403" in failed.stderr


@pytest.mark.parametrize("kind", ("tinyproxy", "microsocks", "socks5h"))
def test_other_proxies_take_over_when_the_settings_change(lab: Lab, kind: str) -> None:
    host = lab.world.host
    lab.set_proxy("")
    open_before = lab.tunnel(f"{FAR4}:80")
    daemon: Tinyproxy | Microsocks
    if kind == "tinyproxy":
        daemon = Tinyproxy(host, lab.folder / kind, "127.0.0.1", 8081)
        url = "http://localhost:8081"
    else:
        daemon = Microsocks(host, lab.folder / kind, "127.0.0.1", 8082, "user", SECRET)
        url = f"{'socks5' if kind == 'microsocks' else 'socks5h'}://user:{SECRET}@127.0.0.1:8082"
    # microsocks asks the system's resolver, which knows no name here.
    name = FAR4 if kind == "socks5h" else "web.test"
    with daemon:
        lab.set_proxy(f'all = "{url}"\nhttp = "{url}"\nhttps = "{url}"\n')
        before = len(daemon.log)
        if kind != "tinyproxy":
            assert lab.ask("--proxy", PROXY, f"https://{name}/x")["path"] == "/x"
            assert lab.ask("--proxy", f"socks5h://{GATEWAY4}:1080", f"http://{name}/y")["path"] == "/y"
        else:
            assert lab.ask("--proxy", PROXY, f"http://{FAR4}/x")["path"] == "/x"
            assert lab.ask("--proxy", PROXY, f"https://{FAR4}/y")["path"] == "/y"
        wait_until(lambda: len(daemon.log) > before, "the proxy was asked")
    # The tunnel from before is open, and works.
    open_before.sendall(b"GET /old HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n\r\n")
    assert b'"path": "/old"' in receive_all(open_before)
    open_before.close()


@pytest.mark.parametrize("scheme", ("http", "https"))
def test_proxy_py_is_asked_with_the_hosts_credentials_in_tls_or_not(lab: Lab, scheme: str) -> None:
    certificate = lab.authority.issue_cert("127.0.0.1") if scheme == "https" else None
    credentials = f"user:{SECRET}"
    with ProxyPy(
        *(lab.world.host, lab.folder / f"py-{scheme}", "127.0.0.1", 8083),
        credentials=credentials,
        certificate=certificate,
    ) as daemon:
        # It asks the system's resolver, which knows no name here.
        plain, secure = f"http://{FAR4}", f"https://{FAR4}"
        set_both(lab, f"{scheme}://{credentials}@127.0.0.1:8083")
        headers = lab.ask("--proxy", PROXY, f"{plain}/x")["headers"]
        assert "proxy.py" in str(headers) and "proxy-authorization" not in str(headers).lower()
        assert lab.ask("--proxy", PROXY, f"{secure}/y")["path"] == "/y"
        wait_until(lambda: f"CONNECT {FAR4}:443" in daemon.log, "the proxy tells of the tunnel")
        assert lab.ask(f"{secure}/z")["path"] == "/z"  # by a guest that knows of none
        for url in (plain, secure):
            size = lab.curl("--proxy", PROXY, "-o", "/dev/null", "-w", "%{size_download}", f"{url}/bytes/3000000")
            assert size.stdout == "3000000"

        set_both(lab, f"{scheme}://user:Falsch9@127.0.0.1:8083")
        answer = lab.curl("--proxy", PROXY, "-i", plain).stdout
        assert "HTTP/1.1 502" in answer and "does not accept the host's credentials" in answer
        assert "Proxy-Authenticate" not in answer
        assert "response 502" in lab.curl("--proxy", PROXY, secure, check=False).stderr
        assert "Falsch9" not in lab.netstack.log

        set_both(lab, f"{scheme}://127.0.0.1:8083")
        for url in (plain, secure):
            assert "407" in lab.curl("--proxy", PROXY, "-w", "%{http_code} %{http_connect}", url, check=False).stdout
            found = lab.ask("--proxy", PROXY, "--proxy-anyauth", "--proxy-user", credentials, f"{url}/mine")
            assert found["path"] == "/mine"


@pytest.mark.parametrize(
    ("name", "trusted", "words"),
    (
        ("localhost", True, "ostname mismatch, certificate is not valid for 'localhost'"),
        ("127.0.0.1", False, "unable to get local issuer certificate"),
    ),
)
def test_a_proxy_with_a_wrong_certificate_is_told_nothing(lab: Lab, name: str, trusted: bool, words: str) -> None:
    authority = lab.authority if trusted else trustme.CA()
    with ProxyPy(
        *(lab.world.host, lab.folder / f"py-{name}", "127.0.0.1", 8084),
        credentials=f"user:{SECRET}",
        certificate=authority.issue_cert("127.0.0.1"),
    ) as daemon:
        set_both(lab, f"https://user:{SECRET}@{name}:8084")
        answer = lab.curl("--proxy", PROXY, "-i", "http://web.test/").stdout
        assert "HTTP/1.1 502" in answer and words in answer
        assert f"no TLS with the proxy https://***@{name}:8084" in answer
        assert "response 502" in lab.curl("--proxy", PROXY, "https://web.test/", check=False).stderr
        assert "web.test" not in daemon.log


def set_both(lab: Lab, url: str) -> None:
    lab.set_proxy(f'http = "{url}"\nhttps = "{url}"\n')


def test_a_proxy_that_is_down_is_told_to_the_guest(lab: Lab) -> None:
    lab.set_proxy('http = "http://127.0.0.1:9"\nhttps = "http://127.0.0.1:9"\n')
    answer = lab.curl("--proxy", PROXY, "http://web.test/").stdout
    assert "the proxy http://127.0.0.1:9 cannot be reached: 127.0.0.1 refuses the connection" in answer


def test_wrong_credentials_of_the_host_are_told_and_not_asked_for(lab: Lab) -> None:
    lab.set_proxy('http = "http://user:wrong@127.0.0.1:8080"\n')
    answer = lab.curl("--proxy", PROXY, "-i", "http://web.test/").stdout
    assert "HTTP/1.1 502" in answer and "does not accept the host's credentials" in answer
    assert "Proxy-Authenticate" not in answer and "wrong" not in lab.netstack.log


def test_a_guest_may_give_credentials_that_the_host_does_not_have(lab: Lab) -> None:
    lab.set_proxy('http = "http://127.0.0.1:8080"\nhttps = "http://127.0.0.1:8080"\n')
    for url in ("http://web.test/mine", "https://web.test/mine"):
        found = lab.ask("--proxy", PROXY, "--proxy-anyauth", "--proxy-user", f"user:{SECRET}", url)
        assert found["path"] == "/mine"


# ---- tunnels that the stack carries ----------------------------------------------------------------------------------


def test_a_tunnel_is_carried_by_the_stack_and_ends_as_its_ends_do(lab: Lab) -> None:
    lab.set_proxy("")
    joined = lab.count("proxy_joined")
    with listen(lab.world.far, FAR6) as listener:
        ours = lab.tunnel(f"[{FAR6}]:{port_of(listener)}")
        listener.accept()[0].close()
        assert ours.recv(1) == b""
        ours.close()
    with listen(lab.world.far, FAR4) as listener:
        # Half-closed, both ways.
        ours = lab.tunnel(f"{FAR4}:{port_of(listener)}")
        theirs, _ = listener.accept()
        theirs.settimeout(PATIENCE)
        ours.sendall(b"up")
        ours.shutdown(socket.SHUT_WR)
        assert theirs.recv(10, socket.MSG_WAITALL) == b"up"
        theirs.sendall(b"down")
        theirs.close()
        assert ours.recv(10, socket.MSG_WAITALL) == b"down"
        ours.close()
        # A reset of the guest's reaches the peer, and the peer's the guest.
        for first in ("guest", "peer"):
            ours = lab.tunnel(f"{FAR4}:{port_of(listener)}")
            theirs, _ = listener.accept()
            theirs.settimeout(PATIENCE)
            near, other = (ours, theirs) if first == "guest" else (theirs, ours)
            other.sendall(b"x")
            assert near.recv(1) == b"x"
            reset(near)
            with pytest.raises(ConnectionResetError):
                other.recv(1)
            other.close()
    assert lab.count("proxy_joined") == joined + 4
    wait_until(lambda: lab.server()["connections"] == 0, "nothing is left of them in the proxy")


def test_bytes_that_come_with_connect_are_not_lost(lab: Lab) -> None:
    lab.set_proxy("")
    early = bytes(range(256)) * 800  # 200 KiB: more than any one read
    with listen(lab.world.far, FAR4) as listener:
        place = f"{FAR4}:{port_of(listener)}"
        ours = connect(lab.guest, GATEWAY4, 3128)
        ours.sendall(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n".encode() + early)
        theirs, _ = listener.accept()
        theirs.settimeout(PATIENCE)
        with ours, theirs:
            received = b""
            while len(received) < len(early):
                received += theirs.recv(1 << 20)
            assert received == early
            theirs.sendall(b"end")
            assert ours.recv(100).startswith(b"HTTP/1.1 200 ")


def test_five_hundred_tunnels_at_once(lab: Lab) -> None:
    lab.set_proxy("")
    count = 500
    with contextlib.ExitStack() as stack, listen(lab.world.far, FAR4, backlog=1024) as listener:
        place = f"{FAR4}:{port_of(listener)}"
        request = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n".encode()
        tunnels = []
        for _ in range(count):
            sock = stack.enter_context(connect(lab.guest, GATEWAY4, 3128))
            sock.sendall(request)
            tunnels.append(sock)
        peers = []
        for _ in range(count):
            peer, _ = listener.accept()
            peers.append(stack.enter_context(peer))
        for peer in peers:
            peer.sendall(b"hello")
        for sock in tunnels:
            answer = b""
            while not answer.endswith(b"hello"):
                answer += sock.recv(1000)
        assert lab.netstack.status()["flows"]["tcp"] >= count


# ---- what a guest may not --------------------------------------------------------------------------------------------


def test_the_proxy_leads_to_the_hosts_loopback_only_where_the_gateway_does() -> None:
    with contextlib.ExitStack() as stack:
        lab = Lab(stack, "--no-host-loopback")
        listener = stack.enter_context(listen(lab.world.host, "127.0.0.1"))
        listener6 = stack.enter_context(listen(lab.world.host, "::1", port_of(listener)))
        port = port_of(listener)
        for host in (
            *("127.0.0.1", "127.9.9.9", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "localhost", "a.localhost"),
            *("[::1]", "[::]", "[::ffff:127.0.0.1]", GATEWAY4, f"[{GATEWAY6}]", "host.netstack.internal"),
            *("192.168.5.3", "224.0.0.1", "[fe80::1]", "192.168.5.21"),
        ):
            answer = lab.curl("--proxy", PROXY, "-g", "-i", f"http://{host}:{port}/").stdout
            assert answer.startswith("HTTP/1.1 403 "), (host, answer)
            refused = lab.curl("--proxy", PROXY, "--proxytunnel", "-g", f"http://{host}:{port}/", check=False)
            assert "response 403" in refused.stderr, (host, refused.stderr)
            refused = lab.curl("--proxy", f"socks5h://{GATEWAY4}:1080", "-g", f"http://{host}:{port}/", check=False)
            assert refused.returncode == 97, (host, refused.stderr)
        assert not select.select([listener, listener6], [], [], 0)[0]
        assert lab.netstack.status()["drops"]["proxy_denied"] > 30


def test_where_the_gateway_is_the_hosts_loopback_the_proxy_leads_there_too(lab: Lab) -> None:
    lab.set_proxy("")
    with listen(lab.world.host, "127.0.0.1") as listener:
        for host in ("127.0.0.1", GATEWAY4, "host.netstack.internal"):
            tunnel = lab.tunnel(f"{host}:{port_of(listener)}")
            listener.accept()[0].close()
            tunnel.close()


# ---- a guest that knows of none --------------------------------------------------------------------------------------


def test_a_guest_that_knows_of_no_proxy_goes_through_it(lab: Lab) -> None:
    lab.set_proxy(SQUID)
    assert lab.server()["intercepted_ports"] == [80, 443]
    before = len(lab.squid.log)
    assert lab.ask("https://web.test/t")["path"] == "/t"
    assert lab.ask("http://web.test/u")["path"] == "/u"
    log = wait_until(lambda: lab.squid.log[before:] if "/u" in lab.squid.log[before:] else "", "squid logs both")
    assert "CONNECT web.test:443 user" in log and "GET http://web.test/u user" in log


def test_tls_without_a_name_goes_by_the_name_that_the_guest_looked_up(lab: Lab) -> None:
    lab.set_proxy(SQUID)
    before = len(lab.squid.log)
    lab.guest.run("getent", "ahostsv4", "other.test")
    # By its address: there is no name in this ClientHello.
    assert lab.ask(f"https://{FAR4}/n")["path"] == "/n"
    log = wait_until(lambda: lab.squid.log[before:], "squid logs it")
    assert "CONNECT other.test:443" in log


def test_a_refusal_reaches_a_guest_that_knows_of_no_proxy(lab: Lab) -> None:
    lab.set_proxy(SQUID)
    failed = lab.curl("https://blocked.test/", check=False)
    assert failed.returncode in (35, 56)  # in the handshake, or on receiving: a reset
    assert "reset" in failed.stderr
    assert "403" in lab.curl("-o", "/dev/null", "-w", "%{http_code}", "http://blocked.test/").stdout


def test_exceptions_and_other_ports_are_not_intercepted(lab: Lab) -> None:
    lab.set_proxy(SQUID + f'no_proxy = ["{FAR4}/32", "direct.test"]\n')
    before = len(lab.squid.log), lab.count("proxy_transparent_tls")
    assert lab.ask("https://web.test/e")["path"] == "/e"
    assert (len(lab.squid.log), lab.count("proxy_transparent_tls")) == before
    lab.set_proxy(SQUID + 'no_proxy = ["web.test"]\n')
    assert lab.ask("https://web.test/f")["path"] == "/f"
    assert lab.ask("http://web.test/g")["path"] == "/g"
    assert len(lab.squid.log) == before[0]


@pytest.mark.parametrize("far", (FAR4, FAR6))
def test_a_server_that_speaks_first_is_heard(lab: Lab, far: str) -> None:
    lab.set_proxy(SQUID + "transparent_https_ports = [443, 2222]\n")
    with listen(lab.world.far, far, 2222) as listener:
        ours = connect(lab.guest, far, 2222)
        theirs, _ = listener.accept()
        theirs.sendall(b"SSH-2.0-server\r\n")
        assert ours.recv(100) == b"SSH-2.0-server\r\n"
        ours.sendall(b"SSH-2.0-client\r\n")
        theirs.settimeout(PATIENCE)
        assert theirs.recv(100) == b"SSH-2.0-client\r\n"
        ours.close()
        theirs.close()


def test_a_port_that_is_closed_resets(lab: Lab) -> None:
    lab.set_proxy(SQUID + "transparent_https_ports = [443, 2222]\n")
    ours = connect(lab.guest, FAR4, 2222)
    ours.sendall(b"SSH-2.0-client\r\n")
    with pytest.raises(ConnectionResetError):
        ours.recv(1)
    ours.close()


def test_without_a_proxy_nothing_is_intercepted_and_settings_hold_at_once(lab: Lab) -> None:
    lab.set_proxy("")
    assert lab.server()["intercepted_ports"] == []
    before = lab.count("proxy_transparent_tls"), len(lab.squid.log)
    assert lab.ask("https://web.test/")["peer"]
    assert (lab.count("proxy_transparent_tls"), len(lab.squid.log)) == before


def test_quic_is_refused_where_it_is_asked_for(lab: Lab) -> None:
    with datagrams(lab.world.far, FAR4, 443) as server, datagrams(lab.guest, address4_of(0)) as guest:
        for proxy, answered in ((SQUID, True), (SQUID + "block_quic = true\n", False), (SQUID, True)):
            lab.set_proxy(proxy)
            guest.connect((FAR4, 443))
            guest.send(b"hello")
            if answered:
                assert server.recv(100) == b"hello"
            else:
                start = time.monotonic()
                with pytest.raises(ConnectionRefusedError):
                    guest.recv(100)
                assert time.monotonic() - start < 1
    assert lab.netstack.status()["drops"]["udp_blocked"] >= 1
