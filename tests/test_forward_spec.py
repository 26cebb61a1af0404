"""SPEC, from text to fields and back: one table for both directions, one for what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.config import ConfigError
from netstack.config.forward_spec import ForwardSpec, parse_forward

# What is written, its canonical form, and its fields.
SPECS = (
    ("8080:80", "127.0.0.1:8080:80", ForwardSpec("tcp", "127.0.0.1", 8080, guest_port=80)),
    ("0:22", "127.0.0.1:0:22", ForwardSpec("tcp", "127.0.0.1", 0, guest_port=22)),
    ("0.0.0.0:53:53/udp", "0.0.0.0:53:53/udp", ForwardSpec("udp", "0.0.0.0", 53, guest_port=53)),
    ("8080:80/TCP", "127.0.0.1:8080:80", ForwardSpec("tcp", "127.0.0.1", 8080, guest_port=80)),
    ("8080:web:80", "127.0.0.1:8080:web:80", ForwardSpec("tcp", "127.0.0.1", 8080, guest="web", guest_port=80)),
    (
        "8080:Web.netstack.internal:80",
        "127.0.0.1:8080:web:80",
        ForwardSpec("tcp", "127.0.0.1", 8080, guest="web", guest_port=80),
    ),
    (
        "127.0.0.1:8080:192.168.5.20:80",
        "127.0.0.1:8080:192.168.5.20:80",
        ForwardSpec("tcp", "127.0.0.1", 8080, guest="192.168.5.20", guest_port=80),
    ),
    (
        "[::]:8000-8009:[fd00:0::15]:9000-9009",
        "[::]:8000-8009:[fd00::15]:9000-9009",
        ForwardSpec("tcp", "::", 8000, 10, guest="fd00::15", guest_port=9000),
    ),
    ("*:8080:80", "[::]:8080:80", ForwardSpec("tcp", "::", 8080, guest_port=80)),
    ("localhost:8080:80", "127.0.0.1:8080:80", ForwardSpec("tcp", "127.0.0.1", 8080, guest_port=80)),
    ("[fe80::1%eth0]:1:2", "[fe80::1%eth0]:1:2", ForwardSpec("tcp", "fe80::1%eth0", 1, guest_port=2)),
    ("1-65535:1-65535", "127.0.0.1:1-65535:1-65535", ForwardSpec("tcp", "127.0.0.1", 1, 65535, guest_port=1)),
    ("unix:/run/w.sock:80", "unix:/run/w.sock:80", ForwardSpec("unix", path="/run/w.sock", guest_port=80)),
    ("unix:/run/w.sock:80/tcp", "unix:/run/w.sock:80", ForwardSpec("unix", path="/run/w.sock", guest_port=80)),
    (
        "unix:/run/w.sock:web:80",
        "unix:/run/w.sock:web:80",
        ForwardSpec("unix", path="/run/w.sock", guest="web", guest_port=80),
    ),
    (
        "unix:/run/w.sock:[fd00::15]:80",
        "unix:/run/w.sock:[fd00::15]:80",
        ForwardSpec("unix", path="/run/w.sock", guest="fd00::15", guest_port=80),
    ),
    ("unix:/run/a:b::80", "unix:/run/a:b::80", ForwardSpec("unix", path="/run/a:b", guest_port=80)),
    ("unix:/run/web[1]:80", "unix:/run/web[1]:80", ForwardSpec("unix", path="/run/web[1]", guest_port=80)),
    ("unix:/run/web[1]::80", "unix:/run/web[1]:80", ForwardSpec("unix", path="/run/web[1]", guest_port=80)),
    ("unix:/run/a:b/c:80", "unix:/run/a:b/c:80", ForwardSpec("unix", path="/run/a:b/c", guest_port=80)),
)

MISTAKES = (
    ("", "an empty SPEC; write [HOST_IP:]HOST_PORT"),
    ("80", "which port of the host? write 80:80, or 0:80 for a free one"),
    ("web", "write [HOST_IP:]HOST_PORT"),
    ("8080:", "write [HOST_IP:]HOST_PORT"),
    (":8080:80", "write [HOST_IP:]HOST_PORT"),
    ("::1:8080:80", "write [HOST_IP:]HOST_PORT"),
    ("fe80:1:2:3:4", "has too many colons; write IPv6 in brackets"),
    ("host:8080:80", "'host' is no address of this host"),
    ("224.0.0.1:8080:80", "nobody can listen at 224.0.0.1"),
    ("[::ffff:127.0.0.1]:8080:80", "nobody can listen at [::ffff:127.0.0.1]"),
    ("[127.0.0.1]:8080:80", "'[127.0.0.1]' is no address of this host"),
    ("8080:a_b:80", "'a_b' is neither an address nor a name of a guest"),
    ("8080:[fe80::1%eth0]:80", "names an interface of the host"),
    ("8080:80/sctp", "a forward is of /tcp or /udp"),
    ("8080:http", "'http' is no port of the guest"),
    ("http:80", "'http' is no port of the host"),
    ("65536:80", "port 65536 is above 65535"),
    ("8080:0", "a guest has no port 0"),
    ("8009-8000:9000-9009", "the range 8009-8000 ends before it begins"),
    ("8000-8009:80", "10 ports of the host cannot lead to 1 of the guest"),
    ("0-9:80-89", "port 0 takes one free port"),
    ("\u0661:80", "is no port of the host"),
    ("8080:80\n", "has characters that cannot be in a SPEC"),
    ("8" * 600, "is longer than 512 characters"),
    ("unix:", "write unix:HOST_PATH"),
    ("unix:/run/w.sock", "write unix:HOST_PATH"),
    ("unix:w.sock:80", "w.sock is no absolute path"),
    ("unix:/run/w.sock:80/udp", "a unix socket leads to a TCP port"),
    ("unix:/run/w.sock:80-81", "a unix socket leads to one port"),
    ("unix:/run/w.sock:0", "a unix socket leads to one port"),
    (f"unix:/{'a' * 103}:80", "the path has 104 bytes, a socket takes 103"),
    ("unix:/run[::1]:80", "write unix:HOST_PATH"),
)


@pytest.mark.parametrize(("text", "canonical", "spec"), SPECS)
def test_a_spec_from_text_and_back(text: str, canonical: str, spec: ForwardSpec) -> None:
    assert parse_forward(text) == spec
    assert str(spec) == canonical
    assert parse_forward(canonical) == spec


@pytest.mark.parametrize(("text", "words"), MISTAKES)
def test_a_mistake_is_named_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_forward(text)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.text("0123456789:-[]./%*abfuxinX_ \n\u0661\u00e9", max_size=40) | st.text(max_size=20))
def test_no_text_does_anything_but_parse_or_fail(text: str) -> None:
    for prefix in ("", "unix:", "unix:/"):
        try:
            spec = parse_forward(prefix + text)
        except ConfigError:
            continue
        assert parse_forward(str(spec)) == spec
