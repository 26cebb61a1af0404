"""What gvproxy's clients send, byte for byte, and what they must be answered: for tests/control/test_gvproxy.py.

The requests are as Go's net/http client writes them (its order of headers, Host "base" or "unix" as podman and CRC call
a unix socket), made by hand. Answers are those that gvproxy gives, in which 192.168.5.2 stands for its gateway.

Each exchange: a name, the request's line and body, and the answer's status, content type and body. "PORT1" and "PORT2"
in bodies are free ports of the test.
"""

from __future__ import annotations

from typing import NamedTuple

TEXT = "text/plain; charset=utf-8"


class Exchange(NamedTuple):
    method: str
    target: str
    body: str
    status: int
    answer: str

    def request(self) -> bytes:
        """As Go's client writes it. With a body it has been given a length and says what it is."""
        head = [f"{self.method} {self.target} HTTP/1.1", "Host: base", "User-Agent: Go-http-client/1.1"]
        if self.method != "GET":
            head.append(f"Content-Length: {len(self.body.encode())}")
            if self.body:
                head.append("Content-Type: application/json")
        head.append("Accept-Encoding: gzip")
        return "\r\n".join([*head, "", self.body]).encode()


def _get(target: str, answer: str) -> Exchange:
    return Exchange("GET", target, "", 200, answer)


def _post(target: str, body: str, status: int = 200, answer: str = "") -> Exchange:
    return Exchange("POST", target, body, status, answer)


ALL, EXPOSE, UNEXPOSE = (f"/services/forwarder/{name}" for name in ("all", "expose", "unexpose"))
ZONES, ADD = "/services/dns/all", "/services/dns/add"

EXCHANGES = (
    _get(ALL, "[]\n"),
    # podman machine's ssh port, podman run -p 8080:80, CRC's unix socket
    _post(EXPOSE, '{"local":"127.0.0.1:PORT1","remote":"192.168.5.15:22","protocol":"tcp"}'),
    _post(EXPOSE, '{"local":":PORT2","remote":"192.168.5.15:80","protocol":"tcp"}'),
    _post(EXPOSE, '{"local":":PORT2","remote":"192.168.5.15:53","protocol":"udp"}'),
    _post(EXPOSE, '{"local":"FOLDER/crc.sock","remote":"tcp://192.168.5.15:6443","protocol":"unix"}'),
    _get(
        ALL,
        '[{"local":"127.0.0.1:PORT1","remote":"192.168.5.15:22","protocol":"tcp"},'
        '{"local":"FOLDER/crc.sock","remote":"tcp://192.168.5.15:6443","protocol":"unix"},'
        '{"local":":PORT2","remote":"192.168.5.15:80","protocol":"tcp"},'
        '{"local":":PORT2","remote":"192.168.5.15:53","protocol":"udp"}]\n',
    ),
    # without a protocol it is tcp
    _post(
        EXPOSE,
        '{"local":"127.0.0.1:PORT1","remote":"192.168.5.15:22"}',
        500,
        "proxy already running for tcp on 127.0.0.1:PORT1\n",
    ),
    # another text for the same port is another key, and the port is taken
    _post(
        EXPOSE,
        '{"local":"127.0.0.1:PORT2","remote":"192.168.5.15:22"}',
        500,
        "listen tcp 127.0.0.1:PORT2: bind: address already in use\n",
    ),
    _post(UNEXPOSE, '{"local":"127.0.0.1:PORT1","protocol":"tcp","more":1}'),
    _post(UNEXPOSE, '{"local":"127.0.0.1:PORT1","protocol":"tcp"}', 500, "proxy not found\n"),
    _post(UNEXPOSE, '{"local":":PORT2"}'),
    _post(UNEXPOSE, '{"local":":PORT2"}', 500, "proxy not found\n"),
    _post(UNEXPOSE, '{"local":":PORT2","protocol":"udp"}'),
    _post(UNEXPOSE, '{"local":"FOLDER/crc.sock","protocol":"unix"}'),
    _get(ALL, "[]\n"),
    # what is refused
    Exchange("GET", EXPOSE, "", 400, "post only\n"),
    Exchange("PUT", EXPOSE, "{}", 400, "post only\n"),
    Exchange("GET", UNEXPOSE, "", 400, "post only\n"),
    _post(EXPOSE, "", 400, "EOF\n"),
    _post(EXPOSE, "{", 400, "unexpected EOF\n"),
    _post(EXPOSE, "local", 400, "invalid character 'l' looking for beginning of value\n"),
    _post(
        EXPOSE,
        '{"local":8080}',
        400,
        "json: cannot unmarshal number into Go struct field ExposeRequest.local of type string\n",
    ),
    _post(
        UNEXPOSE,
        '{"local":"x","protocol":[]}',
        400,
        "json: cannot unmarshal array into Go struct field UnexposeRequest.protocol of type types.TransportProtocol\n",
    ),
    _post(EXPOSE, "{}", 400, "missing port in address\n"),
    _post(EXPOSE, '{"local":":PORT1","remote":"192.168.5.15"}', 400, "address 192.168.5.15: missing port in address\n"),
    _post(EXPOSE, '{"local":":PORT1","remote":"a:b:c"}', 400, "address a:b:c: too many colons in address\n"),
    _post(EXPOSE, '{"local":":PORT1","remote":"[a]b:1"}', 400, "address [a]b:1: missing port in address\n"),
    # a client of a unix socket has no address that could stand in for the guest's
    _post(EXPOSE, '{"local":":PORT1","remote":":8080"}', 400, "address @: missing port in address\n"),
    _post(
        EXPOSE,
        '{"local":":PORT1","remote":"192.168.5.15:http"}',
        500,
        'strconv.ParseUint: parsing "http": invalid syntax\n',
    ),
    _post(
        EXPOSE,
        '{"local":":PORT1","remote":"192.168.5.15:70000"}',
        500,
        'strconv.ParseUint: parsing "70000": value out of range\n',
    ),
    _post(EXPOSE, '{"local":":PORT1","remote":"192.168.5.15:80","protocol":"sctp"}', 500, "unknown protocol sctp\n"),
    _post(
        EXPOSE,
        '{"local":"PORT1","remote":"192.168.5.15:80"}',
        500,
        "listen tcp: address PORT1: missing port in address\n",
    ),
    _post(EXPOSE, '{"local":":70000","remote":"192.168.5.15:80"}', 500, "listen tcp: address 70000: invalid port\n"),
    _post(
        EXPOSE,
        '{"local":"192.0.2.77:PORT1","remote":"192.168.5.15:80"}',
        500,
        "listen tcp 192.0.2.77:PORT1: bind: cannot assign requested address\n",
    ),
    _post(
        EXPOSE,
        '{"local":"FOLDER/none/a.sock","remote":"tcp://192.168.5.15:80","protocol":"unix"}',
        500,
        "listen unix FOLDER/none/a.sock: bind: no such file or directory\n",
    ),
    _post(
        EXPOSE,
        '{"local":"FOLDER/b.sock","remote":"udp://192.168.5.15:80","protocol":"unix"}',
        500,
        "remote protocol for unix forwarder is not implemented: udp\n",
    ),
    _get(ALL, "[]\n"),
    # names
    _get(
        ZONES,
        '[{"Name":"containers.internal.","Records":[{"Name":"gateway","IP":"192.168.5.2"},'
        '{"Name":"host","IP":"192.168.5.2"}],"DefaultIP":""},'
        '{"Name":"docker.internal.","Records":[{"Name":"gateway","IP":"192.168.5.2"},'
        '{"Name":"host","IP":"192.168.5.2"}],"DefaultIP":""}]\n',
    ),
    _post(ADD, '{"Name":"crc.testing.","Records":[{"Name":"host","IP":"192.168.5.2"}],"DefaultIP":""}'),
    _post(ADD, '{"Name":"apps-crc.testing.","Records":null,"DefaultIP":"192.168.5.15"}'),
    _post(ADD, '{"Name":"crc.testing.","Records":[{"Name":"api","IP":"192.168.5.15"}]}'),
    _get(
        ZONES,
        '[{"Name":"containers.internal.","Records":[{"Name":"gateway","IP":"192.168.5.2"},'
        '{"Name":"host","IP":"192.168.5.2"}],"DefaultIP":""},'
        '{"Name":"docker.internal.","Records":[{"Name":"gateway","IP":"192.168.5.2"},'
        '{"Name":"host","IP":"192.168.5.2"}],"DefaultIP":""},'
        '{"Name":"crc.testing.","Records":[{"Name":"api","IP":"192.168.5.15"},{"Name":"host","IP":"192.168.5.2"}],'
        '"DefaultIP":""},'
        '{"Name":"apps-crc.testing.","Records":[],"DefaultIP":"192.168.5.15"}]\n',
    ),
    Exchange("GET", ADD, "", 400, "post only\n"),
    _post(ADD, '{"Name":"x.","Records":[{"Name":"a","IP":"nonsense"}]}', 400, "invalid IP address: nonsense\n"),
    _post(
        ADD,
        '{"Name":"x.","Records":[{"Name":1}]}',
        400,
        "json: cannot unmarshal number into Go struct field Record.Records.Name of type string\n",
    ),
    # who is there: nobody
    _get("/services/dhcp/leases", '{"192.168.5.2":"52:55:c0:a8:05:02"}\n'),
    _get("/leases", '{"192.168.5.2":"52:55:c0:a8:05:02"}\n'),
    _get("/cam", "{}\n"),
    # Go's mux
    Exchange("GET", "/services/nothing", "", 404, "404 page not found\n"),
    # /tunnel, whose answers are HTTP only when it cannot be
    Exchange("POST", "/tunnel?port=22", "", 500, "ip is mandatory\n"),
    Exchange("POST", "/tunnel?ip=192.168.5.15", "", 500, 'strconv.Atoi: parsing "": invalid syntax\n'),
    Exchange("POST", "/tunnel?ip=192.168.5.15&port=ssh", "", 500, 'strconv.Atoi: parsing "ssh": invalid syntax\n'),
)
