"""docs/architecture.md tells the truth: every file, class and function that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = re.findall(
    r"`((?:swarm|peer|router|simulator|kernels|bootstrap)/[\w/]+\.py)`(?:\s+`([\w.]+)`)?", TEXT
)


def names_of(path: Path) -> set[str]:
    """Top-level names of a module, and Class.method for its methods."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
            found |= {
                f"{node.name}.{item.name}"
                for item in node.body
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
    return found


def test_it_names_enough() -> None:
    assert sum(bool(name) for _, name in NAMED) >= 15


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_what_is_named_exists(file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file()
    assert not name or name in names_of(path)


FOLDERS = ["swarm", "peer", "router", "router/placement", "simulator", "kernels", "bootstrap"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_stands_in_the_readme_of_its_folder(folder: str) -> None:
    """That is the nearest README above it."""
    top = ROOT / folder
    readme = (top / "README.md").read_text(encoding="utf-8")
    for path in sorted(top.rglob("*.py")):
        below = [ROOT / other for other in FOLDERS if other.startswith(f"{folder}/")]
        if path.name != "__init__.py" and not any(path.is_relative_to(other) for other in below):
            assert f"`{path.relative_to(top)}`" in readme, path
