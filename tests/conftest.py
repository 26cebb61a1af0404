"""What all tests share: how hard Hypothesis looks, what a test needs of the machine, and a word on what was left out.

A test that needs a program or an ability says so, `@pytest.mark.needs("netns", "qemu-system-x86_64")`, and is left out
where that is missing. Silence about it would read as success, so the run ends with a list of what did not run and why.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Generator
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

from tests.lab.daemons import find_unpacked
from tests.lab.initramfs import LabUnavailableError
from tests.lab.namespaces import check_namespaces

# fast: the same examples in every run, so that a red run is the fault of the change under test.
# deep: HYPOTHESIS_PROFILE=deep looks for new ones, for hours if need be, and prints how to repeat what it finds.
settings.register_profile("fast", max_examples=60, deadline=None, derandomize=True, database=None)
settings.register_profile(
    "deep", max_examples=20_000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

# A network follows the proxies of its host, and would send what tests ask for to a developer's own.
for _name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[_name]


def _without_root() -> str | None:
    return None if os.geteuid() == 0 else "root"


def _without_namespaces() -> str | None:
    try:
        check_namespaces()
    except LabUnavailableError as error:
        return f"the right to make network namespaces ({error})"
    return None


def _without_tap() -> str | None:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"/dev/net/tun ({error.strerror})"
    return None


# Each says what is missing, or None.
ABILITIES = {"root": _without_root, "netns": _without_namespaces, "tun": _without_tap}

# Where the name of the program is not the name of its Debian package.
DEBIAN_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "gsettings": "libglib2.0-bin",
    "musl-gcc": "musl-tools",
    "nft": "nftables",
    "ip": "iproute2",
    "unshare": "util-linux",
    "vde_switch": "vde2",
    "vde_plug": "vde2",
    "dnsmasq": "dnsmasq-base",
    "knotd": "knot",
    "kdig": "knot-dnsutils",
    "dhclient": "isc-dhcp-client",
    "dropbear": "dropbear-bin",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "ping": "iputils-ping",
    "pasta": "passt",
}


@cache
def lacking(what: str) -> str | None:
    """Why this machine lacks the ability or program `what`, or None when it has it."""
    if what in ABILITIES:
        missing = ABILITIES[what]()
        return missing and f"needs {missing}"
    if shutil.which(what) or shutil.which(what, path="/usr/sbin:/sbin") or find_unpacked(what):
        return None
    return f"needs {what} (Debian package {DEBIAN_PACKAGES.get(what, what)})"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Leaves a test out whose machine is not here: said by its mark, or found by the lab in a fixture."""
    for mark in item.iter_markers("needs"):
        for what in mark.args:
            if reason := lacking(what):
                pytest.skip(reason)
    try:
        yield
    except LabUnavailableError as error:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """The same, found by the lab while the test runs."""
    try:
        yield
    except LabUnavailableError as error:
        pytest.skip(str(error))


def _kind(nodeid: str) -> str:
    """The folder under tests/ that a test comes from."""
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 else "tests"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """Says what was left out, by kind and reason."""
    left_out: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        # A file that was skipped as a whole reports once, while collecting.
        unit = "" if isinstance(report, pytest.TestReport) else " (whole files)"
        left_out[_kind(report.nodeid) + unit, reason.removeprefix("Skipped: ")] += 1
    if deselected := terminalreporter.stats.get("deselected", []):
        terminalreporter.write_line(f"{len(deselected)} tests were deselected on the command line")
    if not left_out:
        if exitstatus not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
            return  # interrupted: nobody knows what would have been left out
        terminalreporter.write_sep("=", "nothing was left out", green=True)
        return
    terminalreporter.write_sep("!", f"LEFT OUT: {left_out.total()} tests did not run here", yellow=True, bold=True)
    for (kind, reason), count in sorted(left_out.items()):
        terminalreporter.write_line(f"  {kind}: {count} left out: {reason}", yellow=True)
    terminalreporter.write_sep("!", "what they check is NOT known to work on this machine", yellow=True, bold=True)
