"""Settings: what is taken, what is refused and in which words, and where files go."""

from __future__ import annotations

import tomllib
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from netstack.config import Config, ConfigError, parse_api_uri, parse_link_uri, runtime_directory, state_directory
from netstack.config.tables import NetworkTable, subnet6_beside
from netstack.config.toml_lines import key_lines, line_of

COMPLETE = """\
# everything that a file may hold
[network]
subnet = "10.1.2.0/24"
subnet6 = "fd12:3456::/64"
gateway = "10.1.2.1"
mtu = 1500
host_loopback = false

[[link]]
uri = "unix:///run/a.sock"

[[link]]
uri = "vde:///run/b.ctl"

[[guest]]
name = "web"
mac = "52-54-00-AA-BB-01"
address = "10.1.2.20"
address6 = "fd12:3456::20"

[[publish]]
spec = "0.0.0.0:8080-8082:web:80-82"
on_conflict = "loopback"
source = "gateway"

[dns]
upstreams = ["tls://192.0.2.9#dns.example", "https://dns.example/dns-query"]
nameservers = ["192.0.2.1", "[2001:db8::1]:5353"]
source = "resolved"
encryption = "opportunistic"
search = ["Example.COM."]

[[dns.route]]
domains = ["Corp.Example.", "8.10.in-addr.arpa"]
upstreams = ["10.8.0.1:5353"]
interface = "tun0"

[pcap]
file = "guests.pcapng"
max_size = "100M"

[api]
listen = ["tcp://127.0.0.1:7070"]

[limits]
flows = 1000
reassembly = "1M"

[log]
level = "debug"
format = "json"

[state]
dir = "/var/lib/netstack"
"""


def load(tmp_path: Path, text: str, **flags: Any) -> Config:
    file = tmp_path / "n.toml"
    file.write_text(text)
    return Config.from_flags(file, **flags)


def problem(tmp_path: Path, text: str, **flags: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **flags)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path), "DIR")


HOST_GUEST = "[[guest]]\nname = '{0}'\nmac = '52:54:00:00:00:0{1}'\naddress = '{2}'\n"


def test_a_guest_may_have_the_hosts_address_in_whatever_network(tmp_path: Path) -> None:
    config = load(tmp_path, HOST_GUEST.format("a", 1, "host"))
    assert config.guest[0].address == "host"
    words = problem(tmp_path, HOST_GUEST.format("a", 1, "host") + HOST_GUEST.format("b", 2, "host"))
    assert words == "DIR/n.toml:8: guest[2].address: host belongs to guest 'a' already"
    words = problem(tmp_path, HOST_GUEST.format("a", 1, "hosts"))
    assert 'hosts must be an IPv4 address such as 192.168.5.20, or "host" for the host\'s own' in words


def test_a_complete_file(tmp_path: Path) -> None:
    config = load(tmp_path, COMPLETE)
    assert config.network.mtu == 1500
    assert not config.network.host_loopback
    assert [link.uri for link in config.link] == ["unix:///run/a.sock", "vde:///run/b.ctl"]
    assert config.guest[0].mac == "52:54:00:aa:bb:01"
    assert config.publish[0].spec == "0.0.0.0:8080-8082:web:80-82"
    assert (config.publish[0].on_conflict, config.publish[0].source) == ("loopback", "gateway")
    assert config.dns.nameservers == ("192.0.2.1", "[2001:db8::1]:5353")
    assert config.dns.upstreams == ("tls://192.0.2.9#dns.example", "https://dns.example/dns-query")
    assert (config.dns.source, config.dns.encryption) == ("resolved", "opportunistic")
    assert config.dns.route[0].domains == ("corp.example", "8.10.in-addr.arpa")
    assert (config.dns.route[0].upstreams, config.dns.route[0].interface) == (("10.8.0.1:5353",), "tun0")
    assert config.dns.search == ("example.com",)
    assert config.pcap.file == tmp_path / "guests.pcapng"  # relative to the file
    assert config.pcap.max_size == 100 << 20
    assert config.limits.reassembly == 1 << 20
    assert config.log.level == "debug"
    assert config.state.dir == Path("/var/lib/netstack")
    addresses = config.network.addresses()
    assert str(addresses.gateway) == "10.1.2.1"
    assert str(addresses.dns) == "10.1.2.3"
    assert str(addresses.gateway6) == "fd12:3456::2"


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Config()


def test_the_default_addresses_are_those_of_the_documentation() -> None:
    assert [str(address) for address in Config().network.addresses()] == [
        "192.168.5.0/24",
        "192.168.5.2",
        "192.168.5.3",
        "fd00:c0a8:5::/64",
        "fd00:c0a8:5::2",
        "fd00:c0a8:5::3",
    ]


@pytest.mark.parametrize(
    ("subnet", "gateway", "subnet6"),
    (
        ("10.0.0.0/8", "10.0.0.2", "fd00:a00::/64"),
        ("172.16.9.0/27", "172.16.9.2", "fd00:ac10:9::/64"),
        ("192.168.5.16/28", "192.168.5.18", "fd00:c0a8:5:10::/64"),
        ("192.168.5.248/29", "192.168.5.250", "fd00:c0a8:5:f8::/64"),
    ),
)
def test_addresses_in_networks_of_all_sizes(subnet: str, gateway: str, subnet6: str) -> None:
    addresses = NetworkTable(subnet=subnet).addresses()
    assert str(addresses.gateway) == gateway
    assert str(addresses.subnet6) == subnet6


def test_auto_takes_the_network_it_is_given() -> None:
    addresses = NetworkTable().addresses(IPv4Network("192.168.6.0/24"))
    assert str(addresses.dns) == "192.168.6.3"
    assert addresses.subnet6 == IPv6Network("fd00:c0a8:6::/64")
    assert subnet6_beside(IPv4Network("192.168.6.0/24")) == addresses.subnet6


@pytest.mark.parametrize(
    ("text", "words"),
    (
        ("[network]\nmtu = 99999\n", "DIR/n.toml:2: network.mtu: 99999 must be 65520 or less"),
        ("[network]\n\nmtu = 1279\n", "DIR/n.toml:3: network.mtu: 1279 must be 1280 or more"),
        ("[network]\nmtu = 'big'\n", "DIR/n.toml:2: network.mtu: big must be a whole number"),
        ("[network]\nmtuu = 3", "DIR/n.toml:2: unknown key 'mtuu' in network; did you mean mtu?"),
        ("\n[netwrk]\nmtu = 3", "DIR/n.toml:2: unknown key 'netwrk' in the file; did you mean network?"),
        ("[log]\nzzz = 3", "DIR/n.toml:2: unknown key 'zzz' in log; it takes level, format"),
        ("network = 3", "DIR/n.toml:1: network: 3 must be a table"),
        ("[link]\nuri = 'fd://3'", "must be a list of tables; write [[link]]"),
        ("[[guest]]\nname = 'a'", "DIR/n.toml:1: guest[1].mac is missing"),
        ("[network]\nsubnet = '10.1.2.0'", "DIR/n.toml:2: network.subnet: 10.1.2.0 says no length; write 10.1.2.0/24"),
        ("[network]\nsubnet = '10.1.2.3/24'", "is an address in a network; write 10.1.2.0/24"),
        ("[network]\nsubnet = '10.1.2.0/30'", "too small"),
        ("[network]\nsubnet = '127.0.0.0/8'", "cannot be a guest's network"),
        ("[network]\nsubnet = '224.0.0.0/8'", "cannot be a guest's network"),
        ("[network]\nsubnet = 'fd00::/64'", "must be auto, or a network such as 192.168.5.0/24"),
        ("[network]\nsubnet6 = 'fd00::/48'", "must be a /64"),
        ("[network]\nsubnet6 = 'fe80::/64'", "cannot be a guest's network"),
        ("[network]\ngateway = '10.0.0.1'", "DIR/n.toml:2: network.gateway needs network.subnet to be named too"),
        (
            "[network]\nsubnet = '10.0.0.0/24'\ngateway = '10.0.0.255'",
            ":3: network.gateway: 10.0.0.255 is no free",
        ),
        (
            "[[link]]\nuri = 'fd://3'\n[[link]]\nuri = 'unix:b'",
            ":4: link[2].uri: unix:b: write an absolute path",
        ),
        ("[[link]]\nuri = 'fd://3'\n[[link]]\nuri = 'fd://3'", "DIR/n.toml:4: link[2].uri: fd://3 is there twice"),
        ("[[guest]]\nname = 'a.b'\nmac = '52:54:00:00:00:01'", "DIR/n.toml:2: guest[1].name: a.b must be a host name"),
        (
            "[[guest]]\nname = 'a'\nmac = '53:54:00:00:00:01'",
            ":3: guest[1].mac: 53:54:00:00:00:01 is a group's",
        ),
        ("[[guest]]\nname = 'a'\nmac = '52540000001'", "must be a MAC address"),
        (
            "[[guest]]\nname = 'a'\nmac = '52:54:00:00:00:01'\naddress = '192.168.5.20'",
            "DIR/n.toml:4: guest[1].address needs network.subnet to be named",
        ),
        ("[dns]\nnameservers = ['one.one.one.one']", "must be the address of a nameserver"),
        ("[dns]\nnameservers = ['192.0.2.1:0']", "has the port 0"),
        ("[dns]\nsearch = ['a b']", "DIR/n.toml:2: dns.search[1]: a b must be a host name"),
        ("[dns]\ndns64 = '64:ff9b::/95'", "DIR/n.toml:2: dns.dns64: 64:ff9b::/95 must have one of the lengths"),
        ("[dns]\nrebind_allow = ['a b']", "DIR/n.toml:2: dns.rebind_allow[1]: a b must be a domain"),
        ("[limits]\ndns_queries = 1", "DIR/n.toml:2: limits.dns_queries: "),
        ("[api]\nlisten = ['tcp://0.0.0.0:80']", "served on loopback only"),
        ("[pcap]\nmax_size = '1 MB'", "must be a number of bytes, such as 500M"),
        ("[limits]\nflows = 0", "DIR/n.toml:2: limits.flows: 0 must be 16 or more"),
        ("[log]\nlevel = 'loud'", "DIR/n.toml:2: log.level: loud must be 'debug', 'info', 'warning' or 'error'"),
        ("[[publish]]\nx = 1", "DIR/n.toml:1: publish[1].spec is missing"),
        ("[publish]\nspec = '1:2'", "DIR/n.toml:1: publish: "),
        ("[[publish]]\nspec = '80'", "DIR/n.toml:2: publish[1].spec: 80: which port of the host?"),
        (
            "[[publish]]\nspec = '1:2'\n[[publish]]\nspec = '127.0.0.1:1:b:3'",
            "DIR/n.toml:4: publish[2].spec: 127.0.0.1:1:b:3: publish[1] takes 127.0.0.1:1/tcp already",
        ),
        ("[[publish]]\nspec = '1:192.168.5.2:2'", "DIR/n.toml:2: publish[1].spec: 1:192.168.5.2:2: 192.168.5.2 is the"),
        ("[[publish]]\nspec = '1:2'\non_conflict = 'x'", "DIR/n.toml:3: publish[1].on_conflict: x must be 'error', "),
        ("[proxy]\nhtpt = 1", "DIR/n.toml:2: unknown key 'htpt' in proxy; did you mean http?"),
        ('[proxy]\nhttp = "ftp://u:pw@p"', "DIR/n.toml:2: proxy.http: has a scheme that is no proxy's"),
        ("[dns]\nupstreams = ['192.0.2.1',\n'tls://x']", "DIR/n.toml:2: dns.upstreams[2]: tls://x must be the address"),
        ("[dns]\nnameservers = ['tls://192.0.2.1']", "what has a :// goes into dns.upstreams"),
        ("[dns]\nsource = 'dig'", "DIR/n.toml:2: dns.source: dig must be 'auto', 'resolved', "),
        ("[dns]\n[[dns.route]]\nx = 1", "DIR/n.toml:2: dns.route[1].domains is missing"),
        (
            "[[dns.route]]\ndomains = ['a']\nupstreams = ['192.0.2.1']\nserver = 1",
            "DIR/n.toml:4: unknown key 'server' in dns.route[1]; it takes domains, upstreams, interface",
        ),
        (
            "[[dns.route]]\ndomains = ['a', 'b..c']\nupstreams = ['192.0.2.1']",
            "DIR/n.toml:2: dns.route[1].domains[2]: b..c must be a domain",
        ),
        (
            "[[dns.route]]\ndomains = []\nupstreams = ['192.0.2.1']",
            "DIR/n.toml:2: dns.route[1].domains: [] must not be",
        ),
        ("[dns.route]\ndomains = ['a']", "must be a list of tables; write [[dns.route]]"),
        ("a =\n", "DIR/n.toml:1: not TOML: invalid value"),
        ("a = 1\nb = '''\nx", "DIR/n.toml:3: not TOML: "),
        ("[a]\n[a]", "DIR/n.toml:2: not TOML: "),
    ),
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, words: str) -> None:
    assert words in problem(tmp_path, text)


@pytest.mark.parametrize(
    "proxy",
    (
        {"credentials": "u:hunter2"},
        {"credentials": {"u:hunter2@h:1": "u:hunter2"}},
        {"credentials": {"h": {"hunter2": 1}}},
        {"http": "http://u:hunter2@h h"},
        {"pac": ["http://u:hunter2@h/p"]},
        {"all": {"hunter2": 1}},
    ),
)
def test_a_mistake_about_a_proxy_does_not_show_its_password(proxy: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValidationError)) as caught:
        Config(proxy=proxy)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(ConfigError, match=r"n.toml:2: not UTF-8"):
        Config.load(file)
    file.write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than a megabyte"):
        Config.load(file)
    with pytest.raises(ConfigError, match=r"none.toml: No such file or directory; name a readable TOML file"):
        Config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        Config.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "owner"),
    (
        ("mac", "52:54:00:00:00:01", "guest 'a'"),
        ("name", "A", "guest 'a'"),
        ("address", "10.0.0.20", "guest 'a'"),
        ("address6", "fd00::20", "guest 'a'"),
        ("address", "10.0.0.2", "the gateway"),
        ("address", "10.0.0.3", "DNS"),
        ("address", "10.0.0.0", "the network"),
        ("address", "10.0.0.255", "the network"),
        ("address6", "fd00::2", "the gateway"),
    ),
)
def test_nothing_belongs_to_two(key: str, value: str, owner: str) -> None:
    first = {"name": "a", "mac": "52:54:00:00:00:01", "address": "10.0.0.20", "address6": "fd00::20"}
    second = {"name": "b", "mac": "52:54:00:00:00:02"} | {key: value}
    with pytest.raises(ConfigError) as caught:
        Config(network={"subnet": "10.0.0.0/24", "subnet6": "fd00::/64"}, guest=[first, second])
    assert f"belongs to {owner} already" in str(caught.value)
    assert caught.value.at == ("guest", 1, key)


def test_a_guests_address_must_be_in_the_network() -> None:
    guest = {"name": "a", "mac": "52:54:00:00:00:01", "address": "10.9.0.20"}
    with pytest.raises(ConfigError, match=r"guest\[1\].address: 10.9.0.20 is not in 10.0.0.0/24"):
        Config(network={"subnet": "10.0.0.0/24"}, guest=[guest])


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, COMPLETE, link=["fd://7"], mtu=9000, log_level="error", pcap="x.pcapng", api=())
    assert [link.uri for link in config.link] == ["fd://7"]
    assert config.network.mtu == 9000
    assert config.network.subnet == "10.1.2.0/24"
    assert config.log.level == "error"
    assert config.log.format == "json"
    assert config.pcap.file == Path("x.pcapng")  # a flag's path is meant from here, as with every program
    assert config.api.listen == ("tcp://127.0.0.1:7070",)


@pytest.mark.parametrize(
    ("flags", "words"),
    (
        ({"mtu": 5}, "--mtu 5 must be 1280 or more"),
        ({"subnet": "1.2.3"}, "--subnet 1.2.3 must be auto, or a network such as 192.168.5.0/24"),
        (
            {"link": ["unix://x"]},
            "--link unix://x: write an absolute path after three slashes, as in unix:///run/n.sock",
        ),
        ({"api": ("tcp://1.2.3.4:5",)}, "--api tcp://1.2.3.4:5: the API is served on loopback only"),
        ({"log_level": "loud"}, "--log-level loud must be 'debug', 'info', 'warning' or 'error'"),
    ),
)
def test_a_mistake_in_a_flag_names_the_flag(tmp_path: Path, flags: dict[str, Any], words: str) -> None:
    assert problem(tmp_path, "[log]\nlevel = 'info'\n", **flags).startswith(words)


def test_built_directly() -> None:
    config = Config(network=NetworkTable(mtu=1500), link=[{"uri": "fd://3"}])
    assert config.network.mtu == 1500
    with pytest.raises(ConfigError, match=r"^network.mtu: 1 must be 1280 or more$"):
        Config(network={"mtu": 1})
    with pytest.raises(ValidationError):
        config.link = ()


def test_what_a_service_gets_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netstack.config.runtime_directory", lambda: tmp_path / "run")
    monkeypatch.setattr("netstack.config.state_directory", lambda: tmp_path / "state")
    bare = Config().for_service()
    assert [link.uri for link in bare.link] == [f"unix://{tmp_path}/run/qemu.sock"]
    assert [spec.path for spec in bare.api_listeners()] == [f"{tmp_path}/run/api.sock"]
    assert bare.state.dir == tmp_path / "state"
    given = Config(link=[{"uri": "fd://3"}], api={"listen": ["tcp://[::1]:0"]}, state={"dir": "/s"}).for_service()
    assert [link.uri for link in given.link] == ["fd://3"]
    assert [spec.uri for spec in given.api_listeners()] == [f"unix://{tmp_path}/run/api.sock", "tcp://[::1]:0"]
    assert given.state.dir == Path("/s")
    assert Config(api={"listen": ["none"]}).for_service().api_listeners() == ()
    assert Config().api_listeners() == ()


def test_what_changed() -> None:
    before = Config(network={"mtu": 1500}, link=[{"uri": "fd://3"}])
    after = Config(network={"mtu": 1400, "subnet": "10.0.0.0/24"}, log={"level": "debug"})
    assert before.changed(before) == []
    assert before.changed(after) == ["network.subnet", "network.mtu", "link", "log.level"]


# ---- link and API addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "fields"),
    (
        ("unix:///run/n.sock", {"scheme": "unix", "path": "/run/n.sock"}),
        ("unix:///run/a%20b", {"scheme": "unix", "path": "/run/a b"}),
        ("connect+unix:///q", {"scheme": "connect+unix", "path": "/q"}),
        ("tcp://127.0.0.1:5555", {"scheme": "tcp", "host": "127.0.0.1", "port": 5555}),
        ("tcp://[::1]:0", {"scheme": "tcp", "host": "::1", "port": 0}),
        ("connect+tcp://localhost:1", {"scheme": "connect+tcp", "host": "localhost", "port": 1}),
        ("fd://3", {"scheme": "fd", "fd": 3}),
        ("vde:///run/n.ctl", {"scheme": "vde", "path": "/run/n.ctl"}),
        ("tap://tap0?netns=/run/netns/g", {"scheme": "tap", "device": "tap0", "path": "/run/netns/g", "pid": 0}),
        ("tap://tap0?netns=4711", {"scheme": "tap", "device": "tap0", "path": "", "pid": 4711, "fd": -1}),
        ("tap://veth.0-a_b?fd=3", {"scheme": "tap", "device": "veth.0-a_b", "fd": 3}),
    ),
)
def test_link_uris(uri: str, fields: dict[str, Any]) -> None:
    spec = parse_link_uri(uri)
    assert spec.uri == uri
    assert {name: getattr(spec, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("uri", "words"),
    (
        ("", "is not the address of a link"),
        ("/run/n.sock", "has no scheme; write unix:///run/n.sock"),
        ("unix:/run/n.sock", "write an absolute path after three slashes"),
        ("unix://n.sock", "write an absolute path after three slashes"),
        ("unix:///a%00b", "write an absolute path"),
        ("unix:///" + "a" * 103, "a socket takes 103"),
        ("vde:///" + "a" * 90, "a socket takes 87"),
        ("unix:///a?b=c", "take no options"),
        ("tcp://:80", "'' is not an IP address"),
        ("tcp://1.2.3.4", "write an address and a port"),
        ("tcp://::1:80", "write an address and a port"),
        ("tcp://example.com:80", "'example.com' is not an IP address"),
        ("tcp://1.2.3.4:65536", "above 65535"),
        ("connect+tcp://127.0.0.1:0", "port 0 is no port to connect to"),
        ("fd://x", "the number of an open file descriptor"),
        ("fd://²", "the number of an open file descriptor"),
        ("fd://-1", "the number of an open file descriptor"),
        ("tap://tap0", "say in which network namespace the tap is to be, as in tap://tap0?netns="),
        ("tap://tap0?netns=", "say in which network namespace"),
        ("tap://tap0?netns=guest", "netns is the number of a process or an absolute path"),
        ("tap://tap0?netns=0", "netns is the number of a process or an absolute path"),
        ("tap://tap0?fd=x", "write the number of an open file descriptor, as in tap://tap0?fd=3"),
        ("tap://?netns=1", "write a device's name of at most 15 letters and digits"),
        ("tap://a/b?netns=1", "write a device's name"),
        ("tap://sixteen-letters-?netns=1", "write a device's name"),
        ("tap:tap0?netns=1", "write a device's name"),
        ("dgram:///v", "are not supported yet"),
        ("stdio:", "are not supported yet"),
        ("http://x", "unknown kind of link 'http'"),
    ),
)
def test_bad_link_uris(uri: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_link_uri(uri)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_api_uris() -> None:
    assert parse_api_uri("unix:///run/api.sock").path == "/run/api.sock"
    assert parse_api_uri("tcp://localhost:80")[2:] == ("127.0.0.1", 80)
    assert parse_api_uri("tcp://[::1]:80")[2:] == ("::1", 80)
    for wrong in ("http://127.0.0.1:80", "127.0.0.1:80", "tcp://192.168.1.1:80", "tcp://127.0.0.1"):
        with pytest.raises(ConfigError):
            parse_api_uri(wrong)


# ---- directories ---------------------------------------------------------------------------------------------------


def test_the_runtime_directory_is_made_and_private(tmp_path: Path) -> None:
    place = runtime_directory({"XDG_RUNTIME_DIR": str(tmp_path)})
    assert place == tmp_path / "netstack"
    assert place.stat().st_mode & 0o777 == 0o700
    assert runtime_directory({"XDG_RUNTIME_DIR": str(tmp_path)}) == place


def test_a_runtime_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "netstack").mkdir()
    (tmp_path / "netstack").chmod(0o777)
    with pytest.raises(ConfigError, match="only you can write to"):
        runtime_directory({"XDG_RUNTIME_DIR": str(tmp_path)})
    (tmp_path / "netstack").rmdir()
    (tmp_path / "netstack").symlink_to("/")
    with pytest.raises(ConfigError, match="only you can write to"):
        runtime_directory({"XDG_RUNTIME_DIR": str(tmp_path)})
    with pytest.raises(ConfigError, match="No such file"):
        runtime_directory({"XDG_RUNTIME_DIR": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match="absolute"):
        runtime_directory({"XDG_RUNTIME_DIR": "relative"})


def test_the_state_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    assert state_directory({"XDG_STATE_HOME": "/s"}) == Path("/s/netstack")
    assert state_directory({"XDG_STATE_HOME": "s"}) == Path("/home/u/.local/state/netstack")
    assert state_directory({}) == Path("/home/u/.local/state/netstack")


# ---- the lines of a TOML text --------------------------------------------------------------------------------------

TRICKY = '''\
a = 1 # [not]
"b.c" = "[[no]] # no"
d.e = [
  1, # ]
  "]",
]

[t."x y"]
s = """
[fake]
k = 1
""\\"
"""
u = { v = 1, w = [ 2 ] }
l = \'\'\'
x = 2\'\'\'
[[r]]
k = 1
[[r.s]]
k = 2
[[r.s]]
k = 3
[r.t]
k = 4
[[r]]
[[r.s]]
k = 5
'''


def test_the_lines_of_keys() -> None:
    tomllib.loads(TRICKY)  # so that the text is TOML
    lines = key_lines(TRICKY)
    numbered = TRICKY.splitlines()
    for path, start in (
        (("a",), "a = 1"),
        (("b.c",), '"b.c"'),
        (("d", "e"), "d.e"),
        (("t", "x y"), "[t."),
        (("t", "x y", "s"), 's = """'),
        (("t", "x y", "u"), "u = {"),
        (("t", "x y", "l"), "l = "),
    ):
        assert numbered[lines[path] - 1].startswith(start)
    assert [lines["r", 0, "k"], lines["r", 0, "s", 0, "k"], lines["r", 0, "s", 1, "k"]] == [18, 20, 22]
    assert [lines["r", 0, "t", "k"], lines["r", 1], lines["r", 1, "s", 0, "k"]] == [24, 25, 27]
    assert ("t", "x y", "k") not in lines
    assert ("fake",) not in lines
    assert line_of(("t", "x y", "u", "w", 0), lines) == lines["t", "x y", "u"]
    assert line_of(("nowhere",), lines) is None


def test_forwards_of_flags_join_those_of_the_file_and_replace_those_of_the_same_port(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text("[[publish]]\nspec = '8080:80'\non_conflict = 'next'\n[[publish]]\nspec = '8081:web:81'\n")
    config = Config.from_flags(file, publish=["127.0.0.1:8080:web:8000", "8080:80/udp", "0:22", "0:22"])
    assert [(table.spec, table.on_conflict) for table in config.publish] == [
        ("127.0.0.1:8080:web:8000", "error"),
        ("8081:web:81", "error"),
        ("8080:80/udp", "error"),
        ("0:22", "error"),
        ("0:22", "error"),
    ]
    with pytest.raises(ConfigError, match=r"^-p 8082-8083:1: 2 ports of the host cannot lead to 1"):
        Config.from_flags(file, publish=["8082-8083:1"])
    with pytest.raises(ConfigError, match=r"^-p 8082:1: publish\[3\] takes"):
        Config.from_flags(file, publish=["8082:2", "8082:1"])
