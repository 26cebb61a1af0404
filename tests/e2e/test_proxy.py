"""A real virtual machine and a real proxy on the host: the guest that is told of it, and the guest that is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.namespaces import FAR4, wait_until
from tests.lab.proxies import Squid

if TYPE_CHECKING:
    from tests.e2e.conftest import Lab

pytestmark = [
    pytest.mark.needs("root", "qemu-system-x86_64", "ip", "dnsmasq"),
    pytest.mark.timeout(180),
    pytest.mark.slow,
]

NAME = "web.example.test"


def test_a_guest_uses_the_hosts_proxy_knowingly_and_unknowingly(lab: Lab) -> None:
    config = lab.world.folder / "netstack.toml"
    config.write_text(
        f'[dns.hosts]\n"{NAME}" = "{FAR4}"\n'
        '[proxy]\nsources = ["settings"]\nhttp = "http://user:gEhe1m@127.0.0.1:8080"\nhttps = "http://127.0.0.1:8080"\n'
    )
    squid = Squid(
        lab.world.host, lab.world.folder / "s", "127.0.0.1", 8080, names={NAME: FAR4}, credentials="user:gEhe1m"
    )
    with squid, lab.netstack([f"unix://{lab.socket}"], "-c", str(config)) as netstack, lab.guest("stream", 0) as guest:
        guest.configure()
        told = guest.check("wget -q -O - http://192.168.5.2/proxy.env", 20)
        assert "http_proxy=http://192.168.5.2:3128" in told and "gEhe1m" not in told
        # Knowing of it: busybox' wget reads http_proxy, and asks for the whole URL.
        variables = 'eval "$(wget -q -O - http://192.168.5.2/proxy.env)"'
        assert "Hello, guest." in guest.check(f"{variables}; wget -q -O - http://{NAME}/", 30)
        # Knowing nothing.
        assert NAME in guest.check(f"wget -q -O - http://{NAME}/headers", 30)
        log = wait_until(lambda: squid.log if "/headers" in squid.log else "", "squid was asked both times")
        assert f"GET http://{NAME}/ user" in log and f"GET http://{NAME}/headers user" in log
        counters = netstack.get("/v1/proxy")["server"]["counters"]
        assert counters["proxy_http"] == 1 and counters["proxy_transparent_http"] == 1
        assert "gEhe1m" not in netstack.log
