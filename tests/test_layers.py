"""The import ladder (ARCHITECTURE.md, "Who may import whom"): nobody imports upwards, and no two modules each other."""

import ast
import os
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "netstack"
# From the bottom up. What shares a step does not import each other. "" is netstack/__init__.py, the public API.
LADDER = ("version", "wire", "core", "host vde dns proxy", "control config", "gateway", "", "cli", "__main__")
STEP = {name: step for step, names in enumerate(LADDER) for name in (names.split() or [""])}
IO_AND_CLOCKS = set("trio asyncio socket select selectors ssl subprocess threading time datetime".split())

# os.walk, because Path.rglob does not follow the links netstack/dns and netstack/vde.
FILES = [Path(at, name) for at, _, names in os.walk(ROOT, followlinks=True) for name in names if name.endswith(".py")]
MODULES = {
    ".".join(("netstack", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p for p in FILES
}


def imports(module: str, nodes: Iterable[ast.AST]) -> set[str]:
    """The modules that `nodes` of `module` import; `from package import name` may name a module or a thing in it."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""  # empty in a relative import, which ruff forbids (TID252)
            named = {f"{package}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else package for name in named}
    return found


def part(module: str) -> str:
    """The step's name: `core` of netstack.core.tcp."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_below(module: str) -> None:
    for imported in imports(module, ast.walk(ast.parse(MODULES[module].read_text()))):
        top = imported.split(".")[0]
        if top == "netstack" and part(imported) != part(module):
            assert STEP[part(imported)] < STEP[part(module)], f"{module} imports {imported}, which is not below it"
        if part(module) in {"wire", "core"}:
            assert top not in IO_AND_CLOCKS, f"{module} imports {top}: wire and core do no I/O and read no clock"
        assert top != "scapy" or "pcap" in module, f"{module} imports scapy, which belongs to the pcap commands"


def test_no_two_modules_import_each_other() -> None:
    # Only what runs while the module is imported: a cycle through a function is late, and one for types never happens.
    graph = {module: imports(module, ast.parse(path.read_text()).body) for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()
