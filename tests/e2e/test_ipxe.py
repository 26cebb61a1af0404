"""iPXE, the second independent stack, as the guest: with the cards of three makers, on both kinds of link.

What it fetched is checked at the server on the host, not only on its screen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.e2e.conftest import MACS, Lab, keep_if_failed, open_lab
from tests.lab.ipxe import Ipxe
from tests.lab.namespaces import HOST4, HOST6

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.needs("qemu-system-x86_64", "ip", "dnsmasq"), pytest.mark.timeout(180), pytest.mark.slow]


class Booted(NamedTuple):
    """A lab, and iPXE at its command line in it."""

    lab: Lab
    ipxe: Ipxe


@pytest.fixture(
    scope="module",
    params=(("stream", "virtio-net-pci"), ("vde", "e1000"), ("stream", "rtl8139")),
    ids="-".join,
)
def booted(request: pytest.FixtureRequest, machine: None) -> Iterator[Booted]:
    kind, device = request.param
    for folder in keep_if_failed(request, f"ipxe-{kind}-{device}"):
        with open_lab(folder) as lab:
            lab.stack.enter_context(lab.netstack([lab.link(kind)]))
            ipxe = lab.stack.enter_context(Ipxe(lab.nic(kind, 0)._replace(device=device), folder))
            assert ipxe.run("dhcp", 60).endswith("ok")
            yield Booted(lab, ipxe)


def test_it_has_the_first_address(booted: Booted) -> None:
    routes = booted.ipxe.run("route")
    assert "192.168.5.15/255.255.255.0 gw 192.168.5.2" in routes
    assert booted.ipxe.run("echo ${net0/dns}") == "192.168.5.3"


def test_it_runs_a_script_from_the_host(booted: Booted) -> None:
    output = booted.ipxe.run("chain http://192.168.5.2/boot.ipxe")
    assert "The script from 192.168.5.3 runs as 192.168.5.15" in output
    event = booted.lab.servers.wait_event(event="http", path="/boot.ipxe")
    assert (event["method"], event["host"], event["peer"]) == ("GET", "192.168.5.2", "127.0.0.1")


def test_it_resolves_a_name_and_fetches_a_file(booted: Booted) -> None:
    output = booted.ipxe.run("imgfetch --name a http://v4only.example.test/bytes/3000000", 60)
    assert output.endswith("ok")
    assert "3000000 bytes" in booted.ipxe.run("imgstat a")
    booted.ipxe.run("imgfree a")
    event = booted.lab.servers.wait_event(event="http", path="/bytes/3000000")
    assert (event["host"], event["peer"]) == ("v4only.example.test", HOST4)


def test_it_speaks_ipv6(booted: Booted) -> None:
    assert booted.ipxe.run("ifconf --configurator ipv6", 60).endswith("ok")
    # It heeds the M flag of the router advertisement: its address is from DHCPv6.
    assert "fd00:c0a8:5::15/64 gw fe80::" in booted.ipxe.run("route")
    # From such an address (RFC 4193) it has no route to one of another kind, whatever the gateway: no packet leaves it.
    assert "Network unreachable" in booted.ipxe.run(f"imgfetch http://[{HOST6}]/")
    assert booted.ipxe.run("imgfetch --name b http://[fd00:c0a8:5::2]/bytes/200000", 60).endswith("ok")
    booted.ipxe.run("imgfree b")
    event = booted.lab.servers.wait_event(event="http", path="/bytes/200000")
    assert (event["host"], event["peer"]) == ("[fd00:c0a8:5::2]", "::1")


def test_a_missing_file_is_an_error_at_once(booted: Booted) -> None:
    assert "No such file or directory" in booted.ipxe.run(f"imgfetch http://{HOST4}/nothing")


def test_a_refused_connection_is_an_error_at_once(booted: Booted) -> None:
    assert "Connection reset" in booted.ipxe.run(f"imgfetch http://{HOST4}:444/", 5)


def test_it_gets_the_same_address_again(booted: Booted) -> None:
    booted.ipxe.run("ifclose net0")
    assert booted.ipxe.run("dhcp", 60).endswith("ok")
    assert "192.168.5.15/255.255.255.0" in booted.ipxe.run("route")
    assert MACS[0] in booted.ipxe.run("ifstat")
