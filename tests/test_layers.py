"""Who may import whom, held by reading the imports of every file.

The parts of the program and their permitted directions are the table below; what a reader must
know beyond it is in the docstring of each test. Nothing here runs the program, except the one test
that times `import hexswarm`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CLIENT = {
    *("__init__", "ask", "blocking", "cli", "client", "demo", "picture", "runtime", "session"),
    *("axis", "caption", "map", "scene", "plan_door", "plan_facts", "plan_map"),
    *("conversation", "explained", "opening", "options", "planning", "trace", "tracing", "view"),
    "vigil",
    *("blame", "instructions", "orders", "resume"),
    *("bans", "detector", "failover", "holes", "wards"),
}
"""Modules of swarm/ above the ground floor; every other one belongs to it."""

MAY_IMPORT = {
    "ground": {"ground"},
    "client": {"ground", "client", "router"},
    "router": {"router"},
    "kernels": {"kernels"},
    "peer": {"ground", "router", "kernels", "peer"},
    "bootstrap": {"ground", "router", "bootstrap"},
    "simulator": {"ground", "router", "peer", "simulator"},
}
"""For each part of ours the parts that it may import."""

ALSO = {"router": {"hexswarm.records", "hexswarm.errors"}}
"""Single modules permitted beyond the table."""

NEVER = {
    "ground": {"torch", "triton"},
    "client": {"torch", "triton"},
    "router": {"torch", "triton", "asyncio", "socket", "time", "datetime", "threading", "hivemind"},
    "kernels": {"hivemind", "asyncio", "transformers"},
    "peer": set(),
    "bootstrap": {"torch", "triton"},
    "simulator": {"torch", "triton", "asyncio", "socket", "time", "threading", "hivemind"},
}
"""Modules of others that a part does not import at all."""

PURE = {
    *("hexswarm.quota", "hexswarm.waits"),
    *("hexswarm.shelf", "hexswarm.prefix"),
    *("hexswarm.peer.blocks", "hexswarm.peer.leases"),
    *("hexswarm.peer.cache", "hexswarm.peer.load", "hexswarm.peer.neighbours"),
    *("hexswarm.peer.pace", "hexswarm.peer.promises", "hexswarm.peer.scheduler"),
    *("hexswarm.peer.actions", "hexswarm.peer.admission", "hexswarm.peer.sessions"),
    *("hexswarm.peer.stage", "hexswarm.peer.steps", "hexswarm.peer.tracing"),
    *("hexswarm.peer.journal", "hexswarm.peer.order", "hexswarm.peer.resume"),
    *("hexswarm.peer.cuts", "hexswarm.peer.shares", "hexswarm.peer.slices"),
    *("hexswarm.peer.division", "hexswarm.peer.restarts", "hexswarm.peer.away"),
    *("hexswarm.peer.placement", "hexswarm.peer.advising", "hexswarm.peer.gauges"),
    "hexswarm.peer.foresight",
    *("hexswarm.simulator.run", "hexswarm.advice", "hexswarm.flat"),
    *("hexswarm.peer.exchange", "hexswarm.peer.patience", "hexswarm.peer.reduction"),
    *("hexswarm.peer.spreading", "hexswarm.groups", "hexswarm.peer.groups.formation"),
    "hexswarm.peer.groups.checks",
    *("hexswarm.simulator.ours", "hexswarm.simulator.rivals", "hexswarm.simulator.churn"),
}
"""Bookkeeping apart from tensors: neither these nor what they import need torch."""

LAZY = {
    "gguf": "needed for GGUF files alone",
    "hivemind": "imports torch, 1-2 s",
    "jinja2": "needed by those who have chats",
    "huggingface_hub": "needed for downloads alone, 0.3 s",
    "networkx": "needed for inspection alone, 0.3 s",
    "numpy": "0.1 s, a client that only parses arguments does without",
    "safetensors": "needed for weights alone",
    "tokenizers": "needed by those who have text",
    "torch": "1-2 s",
    "tqdm": "needed on a terminal alone",
    "transformers": "imports half of the environment, 1-3 s",
}
"""Modules of others that a function may import when it needs them, and why."""

LAZY_OURS = {
    ("hexswarm.peer.device_sums", "hexswarm.kernels.linked"): "Triton exists on Linux alone",
    ("hexswarm.store", "hexswarm.default_model"): "one of several sources of a model",
    ("hexswarm.store", "hexswarm.gguf"): "one of several formats of a model",
    ("hexswarm.store", "hexswarm.gguf_config"): "one of several formats of a model",
    ("hexswarm.store", "hexswarm.materialise"): "one of several formats of a model",
}
"""(importer, imported): modules of ours that a function may import when it needs them, and why."""

DOORS = {"hexswarm", "hexswarm.ask", "hexswarm.demo", "hexswarm.plan_door"}
"""Doors besides the files called `cli.py`: they talk to a person and load what is asked for."""


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, where, and whether when a function runs."""

    module: str
    line: int
    lazy: bool
    checking: bool
    """For type checkers alone."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the program."""

    path: Path
    module: str
    part: str
    package: bool

    @property
    def door(self) -> bool:
        return self.path.name == "cli.py" or self.module in DOORS

    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), str(self.path))

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))


@cache
def sources() -> tuple[Source, ...]:
    """All files, as pyproject.toml lists the packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = []
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        for path in sorted((ROOT / folder).glob("*.py")):
            package_itself = path.stem == "__init__"
            module = package if package_itself else f"{package}.{path.stem}"
            found.append(Source(path, module, _part(folder, path.stem), package_itself))
    return tuple(found)


def _part(folder: str, stem: str) -> str:
    top = folder.split("/")[0]
    if top != "swarm":
        return top
    return "client" if folder == "swarm" and stem in CLIENT else "ground"


def by_module() -> dict[str, Source]:
    return {source.module: source for source in sources()}


@cache
def imports(source: Source) -> tuple[Import, ...]:
    """Every import of a file, `from package import module` as that module."""
    return tuple(_imports(source.tree(), lazy=False, checking=False))


def _imports(node: ast.AST, *, lazy: bool, checking: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for name in child.names:
                yield Import(name.name, child.lineno, lazy, checking)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            origin = child.module or ""
            for name in child.names:
                whole = f"{origin}.{name.name}"
                module = whole if whole in by_module() else origin
                yield Import(module, child.lineno, lazy, checking)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from _imports(child, lazy=lazy or function, checking=checking or guard)


def ours(module: str) -> bool:
    return module.split(".")[0] == "hexswarm"


each_source = pytest.mark.parametrize("source", sources(), ids=str)


@each_source
def test_parts_import_only_what_the_table_permits(source: Source) -> None:
    """Dependencies point from doors to the ground; a door loads the doors of other folders."""
    known = by_module()
    for item in imports(source):
        if ours(item.module):
            target = known.get(item.module)
            assert target is not None, f"{source}:{item.line} imports {item.module}: no such file"
            permitted = (
                target.part in MAY_IMPORT[source.part]
                or item.module in ALSO.get(source.part, set())
                or (source.door and target.door and item.lazy)
            )
            assert permitted, f"{source}:{item.line} ({source.part}) imports {item.module}"
        elif not item.checking:
            top = item.module.split(".")[0]
            assert top not in NEVER[source.part], f"{source}:{item.line} imports {item.module}"


@each_source
def test_names_come_from_the_module_that_defines_them(source: Source) -> None:
    """Package roots are for users: inside, nobody imports a name from one."""
    known = by_module()
    for item in imports(source):
        target = known.get(item.module)
        if target is not None and target.package:
            assert source.door, f"{source}:{item.line} imports from the package {item.module}"


@each_source
def test_functions_import_only_what_is_listed(source: Source) -> None:
    """An import inside a function hides a dependency: doors may, others state their reason here."""
    if source.door:
        return
    for item in imports(source):
        if item.lazy:
            listed = item.module.split(".")[0] in LAZY or (source.module, item.module) in LAZY_OURS
            assert listed, f"{source}:{item.line} imports {item.module} inside a function"


def test_the_list_of_lazy_imports_is_true() -> None:
    """What is listed happens, so that the list shrinks with the code."""
    happen = {(source.module, item.module) for source in sources() for item in imports(source)}
    assert set(LAZY_OURS) <= happen


@pytest.mark.parametrize("module", sorted(PURE))
def test_bookkeeping_is_free_of_tensors(module: str) -> None:
    """Scheduler and cache run in the simulator, where there is no torch."""
    known, seen, todo = by_module(), set[str](), [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for item in imports(known[current]):
            if item.checking or item.lazy:
                continue
            assert item.module.split(".")[0] not in {"torch", "triton", "asyncio", "time"}, (
                f"{known[current]}:{item.line} imports {item.module}"
            )
            if ours(item.module):
                todo.append(item.module)


@each_source
def test_only_doors_print(source: Source) -> None:
    for node in ast.walk(source.tree()):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            printing = node.func.id == "print" and not source.door
            assert not printing, f"{source}:{node.lineno} prints"


@each_source
def test_only_the_config_reads_the_environment(source: Source) -> None:
    """Setting a default for a library, or handing all of it on to a child, is not reading."""
    if source.module == "hexswarm.config":
        return
    text = source.path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        reads = re.search(r"\bgetenv\b|(?<!\*\*os\.)\benviron\b(?!\.setdefault\()", line)
        assert not reads or line.lstrip().startswith(("#", "import")), f"{source}:{number} {line}"


def test_every_folder_with_code_is_a_package_of_the_project() -> None:
    """A folder that pyproject.toml does not list would be missing from the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = project["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(setuptools["package-dir"])
    listed = set(setuptools["package-dir"].values())
    for top in ("swarm", "peer", "router", "simulator", "kernels", "bootstrap"):
        for path in (ROOT / top).rglob("*.py"):
            assert str(path.parent.relative_to(ROOT)) in listed, path


def test_kernels_is_no_regular_package() -> None:
    """With an `__init__.py`, a process started here would hide Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_root_is_not_on_the_path_of_tests() -> None:
    """A `conftest.py` at the root would put it there, and our folders would hide packages."""
    assert not (ROOT / "conftest.py").exists()
    assert str(ROOT) not in sys.path


def test_the_package_is_light_to_import() -> None:
    """`import hexswarm`: under 150 ms (best of five) and without torch or hivemind."""
    program = (
        "import time; begun = time.perf_counter(); import hexswarm; "
        "took = time.perf_counter() - begun; import sys; "
        "print(took, *sorted({'torch', 'hivemind', 'transformers'} & set(sys.modules)))"
    )
    times = []
    for _ in range(5):
        command = [sys.executable, "-c", program]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        took, *heavy = answer.stdout.split()
        assert not heavy
        times.append(float(took))
    assert min(times) < 0.150
