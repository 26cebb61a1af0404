"""What guests are told about proxies, in the forms that their programs read.

Theory of operation. There are two things to tell. In "gateway" mode it is always the same, the proxy at the gateway,
which sends each request the way that the host's settings say at that moment; so a guest that was told once is told
for good. In "literal" mode it is what the host has now, with loopback addresses rewritten to the gateway's, where the
host's loopback is found from a guest. What cannot be said in variables (a PAC script) is the gateway's proxy there
too.

Never through a proxy: loopback, the gateway, the guests, and the names of all these. Programs read no_proxy in
different ways, so only what all of them read alike is written: commas without blanks, a name both bare and with a dot
before it, addresses one by one and as an IPv4 network; neither brackets, nor stars, nor IPv6 networks (httpx raises
for those). `all_proxy` names an HTTP proxy in gateway mode, because a SOCKS one ends programs that lack the module
for it (httpx, requests).

Variables are written in both letter cases: curl reads http_proxy in lower case only, Go prefers capitals.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, ip_network
from typing import Final, Literal

from netstack.proxy.exceptions import SIMPLE_NAMES, NoProxy
from netstack.proxy.settings import ProxyServer, ProxySettings, is_loopback, parse_address

Mode = Literal["gateway", "literal", "none"]

_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
# Addresses of guests that are listed one by one, for programs that do not read networks.
_MAX_GUESTS: Final = 32

KEYS: Final = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy")


@dataclass(frozen=True, slots=True)
class Network:
    """The guests' network, as texts."""

    gateway: str
    subnet: str
    own: Sequence[str]  # all addresses that the gateway answers at
    names: Sequence[str]  # host names of the gateway, and the guests' domain
    http_port: int = 3128


@dataclass(frozen=True, slots=True)
class Handout:
    """Proxies by the name of their variable in lower case, and the exceptions."""

    proxies: Mapping[str, str] = field(default_factory=dict)
    no_proxy: Sequence[str] = ()

    def variables(self) -> dict[str, str]:
        """All variables, in lower case."""
        return {**self.proxies, "no_proxy": ",".join(self.no_proxy)} if self.proxies else {}


def make_handout(
    mode: Mode,
    settings: ProxySettings,
    network: Network,
    guests: Sequence[str] = (),
    *,
    credentials: bool = False,
    is_local: Callable[[str], bool] = is_loopback,
) -> Handout:
    """What to tell. `is_local` says which host names are the host's loopback; `guests` are the guests' addresses."""
    if mode == "none":
        return Handout()
    own = f"http://{network.gateway}:{network.http_port}"
    ours = own_exceptions(network, guests)
    if mode == "gateway":
        return Handout(dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), own), ours)
    proxies: dict[str, str] = {}
    for key, scheme, server in (
        ("http_proxy", "http", settings.http),
        ("https_proxy", "https", settings.https),
        ("ftp_proxy", "ftp", settings.ftp),
        ("all_proxy", "tcp", settings.all),
    ):
        if scheme in settings.pac_schemes:
            if key != "ftp_proxy":
                proxies[key] = own
        elif server is not None:
            proxies[key] = rewrite(server, network.gateway, is_local).url(credentials=credentials)
    if settings.no_proxy.match("a.name.that.is.not.listed.invalid") == "*":
        return Handout()
    return Handout(proxies, tuple(dict.fromkeys((*ours, *common_exceptions(settings.no_proxy)))))


def rewrite(server: ProxyServer, gateway: str, is_local: Callable[[str], bool] = is_loopback) -> ProxyServer:
    """The proxy as a guest reaches it: the host's loopback is at the gateway."""
    return server.with_host(gateway) if is_local(server.host) else server


def own_exceptions(network: Network, guests: Sequence[str]) -> tuple[str, ...]:
    """What no guest may send through a proxy."""
    names = [form for name in network.names for form in (name, "." + name)]
    entries = (*_LOOPBACK, *network.own, *guests[:_MAX_GUESTS], network.subnet, *names)
    return tuple(dict.fromkeys(entries))


def common_exceptions(no_proxy: NoProxy) -> list[str]:
    """A host's exceptions in the forms that all programs read alike."""
    found: list[str] = []
    for entry in no_proxy.entries:
        bare = entry.strip("[]")
        try:
            network = ip_network(bare, strict=False)
        except ValueError:
            if entry == SIMPLE_NAMES or "<" in entry:
                continue  # there is no way to write names without a dot
            name = entry.removeprefix("*").lstrip(".").rstrip(".")
            if name and re.fullmatch(r"[a-z0-9_.-]+(:[0-9]+)?", name):
                found += ["." + name] if entry.startswith("*.") else [name, "." + name]
            continue
        if network.prefixlen == network.max_prefixlen:
            found.append(str(network.network_address))
        elif isinstance(network, IPv4Network):
            found.append(str(network))
    return found


def write_pac(handout: Handout) -> str:
    """The same as a PAC script, for guests that look for wpad.dat."""
    proxies = handout.proxies
    if not proxies:
        return 'function FindProxyForURL(url, host) { return "DIRECT"; }\n'
    names, nets = [], []
    for entry in handout.no_proxy:
        try:
            network = ip_network(entry)
        except ValueError:
            names.append(entry.partition(":")[0])
            continue
        if isinstance(network, IPv4Network):
            nets.append([str(network.network_address), str(network.netmask)])
        else:
            names.append(entry)
    by_scheme = {
        scheme: _pac_words(url)
        for scheme, key in (("http", "http_proxy"), ("https", "https_proxy"))
        if (url := proxies.get(key)) is not None
    }
    rest = _pac_words(proxies["all_proxy"]) if "all_proxy" in proxies else "DIRECT"
    return f"""function FindProxyForURL(url, host) {{
  var names = {json.dumps(names)};
  var nets = {json.dumps(nets)};
  var ways = {json.dumps(by_scheme)};
  var i;
  host = host.toLowerCase();
  if (isPlainHostName(host)) return "DIRECT";
  for (i = 0; i < names.length; i++) {{
    if (host === names[i] || (names[i].charAt(0) === "." && dnsDomainIs(host, names[i]))) return "DIRECT";
  }}
  if (/^[0-9.]+$/.test(host)) {{
    for (i = 0; i < nets.length; i++) {{
      if (isInNet(host, nets[i][0], nets[i][1])) return "DIRECT";
    }}
  }}
  return ways[url.split(":")[0].toLowerCase()] || {json.dumps(rest)};
}}
"""


def _pac_words(url: str) -> str:
    scheme, _, place = url.partition("://")
    place = place.rpartition("@")[2].partition("/")[0]
    words = {"http": "PROXY", "https": "HTTPS", "socks4": "SOCKS"}.get(scheme, "SOCKS5")
    return f"{words} {place}"


# ---- formats ---------------------------------------------------------------------------------------------------------


def both_cases(handout: Handout) -> dict[str, str]:
    """Each variable in both letter cases."""
    return {form: value for key, value in handout.variables().items() for form in (key, key.upper())}


def _write_shell(handout: Handout) -> str:
    return "".join(f"export {key}={shlex.quote(value)}\n" for key, value in both_cases(handout).items())


def _write_env(handout: Handout) -> str:
    return "".join(f"{key}={value}\n" for key, value in both_cases(handout).items())


def _write_docker(handout: Handout) -> str:
    """~/.docker/config.json: what docker gives to containers and builds."""
    names = {"http_proxy": "httpProxy", "https_proxy": "httpsProxy", "ftp_proxy": "ftpProxy", "all_proxy": "allProxy"}
    default = {names[key]: value for key, value in handout.proxies.items()}
    if default:
        default["noProxy"] = ",".join(handout.no_proxy)
    return _write_json({"proxies": {"default": default} if default else {}})


def _write_docker_daemon(handout: Handout) -> str:
    """/etc/docker/daemon.json: what dockerd itself pulls through (23.0 and later)."""
    proxies = {key.replace("_", "-"): handout.proxies[key] for key in KEYS[:2] if key in handout.proxies}
    if proxies:
        proxies["no-proxy"] = ",".join(handout.no_proxy)
    return _write_json({"proxies": proxies})


def _write_unit(section: str, key: str) -> Callable[[Handout], str]:
    def write(handout: Handout) -> str:
        lines = [f"[{section}]"]
        for name, value in both_cases(handout).items():
            # systemd expands % and, inside quotes, a backslash.
            text = f"{name}={value}".replace("\\", "\\\\").replace("%", "%%").replace('"', '\\"')
            lines.append(f'{key}="{text}"')
        return "\n".join(lines) + "\n"

    return write


def _write_apt(handout: Handout) -> str:
    """/etc/apt/apt.conf.d/: apt reads no networks here, so what is direct is named host by host."""
    lines = []
    for scheme, key in (("http", "http_proxy"), ("https", "https_proxy")):
        url = handout.proxies.get(key) or handout.proxies.get("all_proxy")
        if url is None:
            continue
        lines.append(f'Acquire::{scheme}::Proxy "{url}";')
        direct = [entry for entry in handout.no_proxy if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", entry)]
        lines += [f'Acquire::{scheme}::Proxy::{host} "DIRECT";' for host in direct]
    return "".join(line + "\n" for line in lines)


def _write_cloud_init(handout: Handout) -> str:
    """User data: the variables for every shell, for services, and apt's own."""
    if not handout.proxies:
        return "#cloud-config\n{}\n"

    def indented(text: str) -> str:
        return "".join(f"      {line}\n" for line in text.splitlines())

    files = (
        ("/etc/profile.d/netstack-proxy.sh", _write_shell(handout)),
        ("/etc/systemd/system.conf.d/netstack-proxy.conf", FORMATS["systemd"](handout)),
        ("/etc/apt/apt.conf.d/90netstack-proxy", _write_apt(handout)),
    )
    parts = [f"  - path: {path}\n    content: |\n{indented(content)}" for path, content in files]
    return "#cloud-config\nwrite_files:\n" + "".join(parts)


def _write_json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


FORMATS: Final[Mapping[str, Callable[[Handout], str]]] = {
    "shell": _write_shell,
    "env": _write_env,
    "docker": _write_docker,
    "docker-daemon": _write_docker_daemon,
    "containerd": _write_unit("Service", "Environment"),
    "systemd": _write_unit("Manager", "DefaultEnvironment"),
    "apt": _write_apt,
    "cloud-init": _write_cloud_init,
    "json": lambda handout: _write_json(both_cases(handout)),
}


def is_loopback_by(addresses: Sequence[str]) -> bool:
    """Whether a name that resolves to these addresses is the host's loopback and nothing else."""
    found = [parse_address(address) for address in addresses]
    return bool(found) and all(one is not None and (one.is_loopback or one.is_unspecified) for one in found)
