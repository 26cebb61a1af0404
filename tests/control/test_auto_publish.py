"""Which listening socket of a guest gets which port of the host, as settings would say it."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, Literal

import pytest

from netstack.config import Config, ConfigError
from netstack.control.auto_publish import Listener, Publication
from netstack.gateway.settings import auto_publish_rules as rules_of

# One line a case: protocol, where the socket is bound, its port, and the place on the host; "-": it gets none.
# What stands in front of the lines is [auto_publish].
CASES: list[tuple[dict[str, Any], str]] = [
    (
        {},  # the rule behind all others: every port, under its own number, on the host's loopback
        """
        tcp 0.0.0.0      8080   127.0.0.1:8080
        tcp ::           8080   127.0.0.1:8080
        tcp 127.0.0.1    8080   127.0.0.1:8080
        tcp ::1          8080   127.0.0.1:8080
        tcp 127.0.0.2    8080   -
        tcp 192.168.5.15 8080   -
        tcp 172.17.0.1   8080   -
        tcp fd00::15     8080   -
        tcp 0.0.0.0      1024   127.0.0.1:1024
        tcp 0.0.0.0      1023   -
        tcp 0.0.0.0      22     -
        tcp 0.0.0.0      65535  127.0.0.1:65535
        tcp 0.0.0.0      40000  127.0.0.1:40000
        udp 0.0.0.0      5000   127.0.0.1:5000
        udp ::           5000   127.0.0.1:5000
        udp 0.0.0.0      40000  -
        udp 0.0.0.0      5353   -
        udp 0.0.0.0      68     -
        """,
    ),
    (
        {
            "rule": [
                {"guest_port": 80, "host_port": 8080},
                {"guest_ports": "4000-4009", "host_ports": "14000-14009", "proto": "tcp"},
                {"guest_ports": [4000, 4009], "host_ip": "0.0.0.0", "proto": "udp"},
                {"guest_port": 7000, "host_ip": "127.0.0.2"},
                {"guest_port": 7000, "host_port": 7001},
                {"guest_port": 9000, "guest_ip": "0.0.0.0"},
                {"guest_port": 40000, "proto": "udp"},
                {"guest_port": 6000, "host_ip": "::1"},
            ]
        },
        """
        tcp 0.0.0.0      80     127.0.0.1:8080
        tcp 127.0.0.1    80     127.0.0.1:8080
        udp 0.0.0.0      80     127.0.0.1:8080
        tcp 0.0.0.0      4000   127.0.0.1:14000
        tcp ::           4009   127.0.0.1:14009
        tcp 0.0.0.0      4010   127.0.0.1:4010
        udp 0.0.0.0      4003   0.0.0.0:4003
        tcp 0.0.0.0      7000   127.0.0.2:7000
        tcp 192.168.5.15 7000   -
        tcp 192.168.5.15 9000   127.0.0.1:9000
        tcp fd00::15     9000   127.0.0.1:9000
        tcp 127.0.0.3    9000   127.0.0.1:9000
        udp 0.0.0.0      40000  127.0.0.1:40000
        tcp 0.0.0.0      6000   ::1:6000
        """,
    ),
    (
        {
            "rule": [
                {"guest_port": 5000, "ignore": True},
                {"guest_port": 5001, "guest_ip": "127.0.0.1", "ignore": True},
                {"guest_port": 5002, "guest_ip": "192.168.5.15", "host_port": 15002},
                {"guest_ports": "5000-5010", "host_ports": "15000-15010"},
                {"guest_port": 5011, "guest_ip_must_be_zero": True, "host_port": 15011},
                {"proto": "udp", "ignore": True},
            ]
        },
        """
        tcp 0.0.0.0      5000   -
        tcp 127.0.0.1    5000   -
        udp ::           5000   -
        tcp 127.0.0.1    5001   -
        tcp 0.0.0.0      5001   127.0.0.1:15001
        tcp 192.168.5.15 5002   127.0.0.1:15002
        tcp 0.0.0.0      5002   127.0.0.1:15002
        tcp 127.0.0.1    5002   127.0.0.1:15002
        tcp ::1          5003   127.0.0.1:15003
        tcp 0.0.0.0      5011   127.0.0.1:15011
        tcp ::           5011   127.0.0.1:15011
        tcp 127.0.0.1    5011   127.0.0.1:5011
        udp 0.0.0.0      6000   -
        """,
    ),
    (
        {
            "privileged": True,
            "fallback": False,
            "rule": [
                {"guest_port": 443},
                {"guest_port": 2222, "host_port": 22, "guest": "web"},
                {"guest_port": 3000, "guest": "other"},
                {"guest_port": 3001, "static": True},
                {"guest_ip": "::1", "guest_port": 3002},
            ],
        },
        """
        tcp 0.0.0.0      443    127.0.0.1:443
        tcp 0.0.0.0      2222   127.0.0.1:22
        tcp 0.0.0.0      3000   -
        tcp 0.0.0.0      3001   -
        tcp ::1          3002   127.0.0.1:3002
        tcp 127.0.0.1    3002   -
        tcp 0.0.0.0      3002   127.0.0.1:3002
        tcp 0.0.0.0      8080   -
        tcp 0.0.0.0      80     -
        """,
    ),
    (
        # Rules that change the number, without `privileged`: what counts is the host's port.
        {"rule": [{"guest_ports": "1000-1100", "host_ports": "2000-2100"}, {"guest_ports": "1-999"}]},
        """
        tcp 0.0.0.0      1000   127.0.0.1:2000
        tcp 0.0.0.0      1023   127.0.0.1:2023
        tcp 0.0.0.0      999    -
        """,
    ),
]
ROWS = [(number, settings, line.split()) for number, (settings, text) in enumerate(CASES)
        for line in text.strip().splitlines()]  # fmt: skip


def listener(protocol: str, address: str, port: int) -> Listener:
    kind: Literal["tcp", "udp"] = "udp" if protocol == "udp" else "tcp"
    return Listener(kind, ip_address(address), port)


def test_there_are_57_cases() -> None:
    assert len(ROWS) == 57


@pytest.mark.parametrize(("settings", "row"), [row[1:] for row in ROWS], ids=[f"{n}-{'-'.join(r)}" for n, _, r in ROWS])
def test_the_first_rule_that_matches_decides(settings: dict[str, Any], row: list[str]) -> None:
    protocol, address, port, expected = row
    rules = rules_of(Config(auto_publish=settings).auto_publish)
    found = rules.decide(listener(protocol, address, int(port)), "web")
    place = f"{found.host}:{found.host_port}" if isinstance(found, Publication) else "-"
    assert place == expected, found


def test_of_several_sockets_of_a_service_the_best_to_reach_is_published() -> None:
    rules = rules_of(Config().auto_publish)
    sockets = [listener("tcp", where, 8080) for where in ("::1", "127.0.0.1", "::", "0.0.0.0")]
    found = rules.publish(sockets, "web")
    assert [str(publication.guest) for publication in found] == ["0.0.0.0"]
    assert [str(one.guest) for one in rules.publish(sockets[:2], "web")] == ["127.0.0.1"]
    assert not rules.publish(sockets[:2], "web")[0].reachable


def test_two_sockets_that_rules_send_to_one_place_share_it_without_a_quarrel() -> None:
    settings = {"rule": [{"guest_port": 80, "host_port": 8080}]}
    rules = rules_of(Config(auto_publish=settings).auto_publish)
    sockets = [listener("tcp", "0.0.0.0", 80), listener("tcp", "0.0.0.0", 8080)]
    first, again = rules.publish(sockets, ""), rules.publish(sockets[::-1], "")
    assert [(one.guest_port, one.host_port) for one in first] == [(80, 8080)]
    assert first == again  # whatever the order in which the guest lists them


def test_static_rules_are_forwards_of_their_own() -> None:
    rules = [
        {"guest_port": 8080, "host_port": 80, "static": True, "proto": "tcp"},
        {"guest_ports": "5000-5002", "guest": "web", "static": True},
        {"guest_port": 9000, "guest_ip": "192.168.5.20", "host_ip": "::1", "static": True, "proto": "udp"},
    ]
    table = Config(auto_publish={"privileged": True, "rule": rules}).auto_publish
    assert rules_of(table).static_specs() == [
        "127.0.0.1:80:8080/tcp",
        "127.0.0.1:5000-5002:web:5000-5002/tcp",
        "127.0.0.1:5000-5002:web:5000-5002/udp",
        "[::1]:9000:192.168.5.20:9000/udp",
    ]


@pytest.mark.parametrize(
    ("rule", "words"),
    (
        ({"guest_port": 80, "host_port": 80}, "rule[1].host_port is below 1024"),
        ({"guest_ports": "1-2", "host_ports": "4000-4004"}, "has 5 ports, and the guest's range 2"),
        ({"guest_ports": "10-9"}, "ends before it begins"),
        ({"guest_ports": "0-9"}, "must be a port or a range"),
        ({"guest_ports": [1, 2, 3]}, "must be a port or a range"),
        ({"guest_port": 70000}, "must be 65535 or less"),
        ({"guest_port": 80, "guest_ports": "80-81"}, "is there beside guest_port"),
        ({"guest_ip": "localhost"}, "must be an address"),
        ({"guest_ip": "127.0.0.1", "guest_ip_must_be_zero": True}, "does not go with guest_ip"),
        ({"static": True}, "needs guest_port or guest_ports"),
        ({"static": True, "guest_port": 80}, "needs auto_publish.privileged"),
        ({"ignore": True, "host_port": 8080}, "does not go with ignore"),
        ({"proto": "sctp"}, "must be 'tcp', 'udp' or 'any'"),
        ({"gest_port": 80}, "did you mean guest_port?"),
    ),
)
def test_a_rule_that_cannot_be_is_refused_by_its_key(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Config(auto_publish={"rule": [rule]})
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
