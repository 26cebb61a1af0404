"""macOS: what `scutil --proxy` prints.

It is a dictionary of the system's property list, written by indentation:

    <dictionary> {
      ExceptionsList : <array> {
        0 : *.local
      }
      HTTPEnable : 1
      HTTPProxy : 127.0.0.1
    }

An enabled service has its Proxy and Port keys (the port may be left to the services database). A PAC script comes
before proxies, and then macOS ignores the exceptions; both are left out here for that reason. With -d there are
proxies of a VPN for the names below a domain, in __SUPPLEMENTAL__, and settings for single interfaces, which are for
programs that bind to one, not for us.

Exceptions are names, wildcards, and networks in short forms (169.254/16, 10.*), which are written out.

A password is in the keychain and not printed. Such a proxy is used without one, and a problem says how to name it.
"""

from __future__ import annotations

import re
from typing import Any

from netstack.proxy.exceptions import SIMPLE_NAMES, NoProxy
from netstack.proxy.layers import Layer, LayerWriter
from netstack.proxy.settings import PacSource

NAME = "macOS"
COMMAND = ("scutil", "-d", "--proxy")

MAX_TEXT = 1 << 20
_MAX_DEPTH = 16

_LINE = re.compile(r"( *)(\S+) : ?(.*)")
_SCRIPT = "ProxyAutoConfigJavaScript"
# The keys that may follow a script of several lines, which are its end.
_KNOWN = re.compile(r"(Exce|Exclude|FTP|Gopher|HTTP|ProxyAuto|RTSP|SOCKS|Transport|FallBack|Bypass|__)\w*")

# Our key, the prefix of theirs, our scheme, and the port of the services database.
_SERVICES = (
    ("http", "HTTP", "http", 80),
    ("https", "HTTPS", "http", 443),
    ("ftp", "FTP", "http", 21),
    ("socks", "SOCKS", "socks5", 1080),
)


def parse_scutil_proxy(text: str) -> Layer:
    """What the system says."""
    tree = _parse_dictionary(text[:MAX_TEXT])
    writer = LayerWriter(NAME, " ".join((COMMAND[0], COMMAND[-1])))
    _take(writer, tree)
    supplemental = tree.get("__SUPPLEMENTAL__")
    for entry in supplemental.values() if isinstance(supplemental, dict) else ():
        domain = entry.get("__MATCH_DOMAIN__") if isinstance(entry, dict) else None
        if isinstance(domain, str) and domain:
            scoped = LayerWriter(NAME, f"{writer.why}, for {domain}")
            _take(scoped, entry)
            writer.domains.append((domain.strip(".").lower(), scoped.layer()))
    return writer.layer()


def _take(writer: LayerWriter, tree: dict[str, Any]) -> None:
    if tree.get("ProxyAutoConfigEnable") == "1":
        script, url = tree.get(_SCRIPT), tree.get("ProxyAutoConfigURLString")
        if isinstance(script, str) and script:
            writer.pac = PacSource(script=script)
        elif isinstance(url, str) and url:
            writer.pac = PacSource(url)
        else:
            writer.problems.append("automatic configuration is on, but names no script")
    if writer.pac is None and tree.get("ProxyAutoDiscoveryEnable") == "1":
        writer.pac = PacSource(discover=True)
    if writer.pac is not None:
        return
    for key, prefix, scheme, port in _SERVICES:
        host = tree.get(f"{prefix}Proxy")
        if tree.get(f"{prefix}Enable") != "1" or not isinstance(host, str) or not host:
            continue
        number = str(tree.get(f"{prefix}Port", port))
        place = f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
        writer.server(key, f"{scheme}://{place}", f"{prefix}Proxy", "http")
        if tree.get(f"{prefix}User"):
            words = "wants a user whose password is in the keychain; name both in [proxy.credentials]"
            writer.problems.append(f"{prefix}Proxy {words}")
    exceptions = tree.get("ExceptionsList")
    entries = [translate_exception(one) for one in exceptions.values()] if isinstance(exceptions, dict) else []
    if tree.get("ExcludeSimpleHostnames") == "1":
        entries.append(SIMPLE_NAMES)
    if entries or writer.servers:
        writer.no_proxy = NoProxy(entries)


def translate_exception(entry: Any) -> str:
    """An entry of ExceptionsList as NO_PROXY has it."""
    text = str(entry).strip() if isinstance(entry, str) else ""
    short = re.fullmatch(r"((?:[0-9]{1,3}\.){0,3}[0-9]{1,3})/([0-9]{1,2})", text)
    if short is not None:
        octets = short[1].split(".")
        return ".".join([*octets, *["0"] * (4 - len(octets))]) + "/" + short[2]
    stars = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3}){0,2})(?:\.\*)+", text)
    if stars is not None:
        octets = stars[1].split(".")
        return ".".join([*octets, *["0"] * (4 - len(octets))]) + f"/{8 * len(octets)}"
    return text


def _parse_dictionary(text: str) -> dict[str, Any]:
    """The first dictionary in the text. What does not look like one is skipped. Never raises."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.strip() == "<dictionary> {":
            break
    root: dict[str, Any] = {}
    stack: list[dict[str, Any]] = [root]
    script: list[str] | None = None
    script_indent = 0
    for line in lines:
        found = _LINE.fullmatch(line)
        if script is not None:
            ends = found is not None and len(found[1]) == script_indent and _KNOWN.fullmatch(found[2])
            if not ends:
                script.append(line)
                continue
            stack[-1][_SCRIPT] = "\n".join(script)
            script = None
        if found is None:
            if line.strip() == "}":
                if len(stack) == 1:
                    break
                stack.pop()
            continue
        indent, key, value = found.groups()
        if value in ("<dictionary> {", "<array> {"):
            child: dict[str, Any] = {}
            stack[-1][key] = child
            if len(stack) < _MAX_DEPTH:
                stack.append(child)
        elif key == _SCRIPT:
            script, script_indent = [value], len(indent)
        else:
            stack[-1][key] = value
    if script is not None:
        # The last brace of all is the dictionary's, not the script's.
        while script and not script[-1].strip():
            script.pop()
        if script and script[-1].strip() == "}":
            script.pop()
        stack[-1][_SCRIPT] = "\n".join(script)
    return root
