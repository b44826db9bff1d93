"""Every code block of the README is executed.

- ```python blocks run here, each as a program of its own, against a live swarm on this machine:
  HEXSWARM_BOOTSTRAP and HEXSWARM_MODEL in the environment stand for what a user would pass.
- ```bash blocks of `make` commands are executed by `.ci/run`; here the targets are checked.
- Any other block needs a comment on the line before it that names the test that executes it:
  `<!-- executed by tests/end_to_end/test_two_machines.py::test_private_swarm -->`
- Blocks in no language, or in `text`, show output or a drawing and are not run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MARKER = re.compile(r"<!-- executed by (?P<file>[\w./-]+)::(?P<test>\w+) -->")
SHOWN = {"", "text", "json"}
"""Languages of blocks that only show something."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    language: str
    code: str
    line: int
    before: str
    """The line of text just above the fence."""

    def __str__(self) -> str:
        return f"line {self.line}"

    @property
    def marker(self) -> re.Match[str] | None:
        return MARKER.fullmatch(self.before.strip())

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell block, without comments, continued lines joined."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(text: str) -> Iterator[Block]:
    """All fenced blocks; AssertionError if one is not closed."""
    lines = text.splitlines()
    number, before = 0, ""
    while number < len(lines):
        opening = re.match(r"^(`{3,})(\w*)\s*$", lines[number])
        if not opening:
            before = lines[number] if lines[number].strip() else before
            number += 1
            continue
        begin = number + 1
        while lines[number := number + 1] != opening[1]:
            assert number + 1 < len(lines), f"the block of line {begin} is not closed"
        yield Block(opening[2], "\n".join(lines[begin:number]) + "\n", begin, before)
        before, number = "", number + 1


BLOCKS = list(blocks(README.read_text(encoding="utf-8"))) if README.exists() else []
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.marker]


def targets() -> set[str]:
    """The targets of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


def test_there_is_something_to_execute() -> None:
    assert {"bash", "python"} <= {block.language for block in BLOCKS}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_executed_somewhere(block: Block) -> None:
    if block.marker:
        text = (ROOT / block.marker["file"]).read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {block.marker['test']}\(", text, re.MULTILINE)
    elif block.language == "bash":
        for command in block.commands:
            words = shlex.split(command)
            assert words[0] == "make", f"{block}: {command!r} is executed by no test"
            assert {word for word in words[1:] if "=" not in word} <= targets()
    else:
        assert block.language in SHOWN | {"python"}, f"{block}: nobody executes {block.language}"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """The environment of a user whose swarm runs on this machine."""
    swarm = pytest.importorskip("tests.end_to_end.swarm", reason="there is no local swarm yet")
    with swarm.LocalSwarm() as local:
        yield {
            **os.environ,
            "HEXSWARM_BOOTSTRAP": ",".join(local.bootstrap),
            "HEXSWARM_MODEL": str(local.model),
        }


@pytest.mark.end_to_end
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    """As a program in an empty folder, without a word on stderr that ends in an error."""
    program = tmp_path / "example.py"
    program.write_text(block.code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# The reader of blocks itself


def test_blocks_are_found_with_their_markers() -> None:
    text = (
        "a\n\n```bash\nmake demo \\\n  PROMPT=x\n# why\n```\n\n"
        "<!-- executed by tests/a.py::test_b -->\n\n```python\n```\n````\n```\n````\n"
    )
    shell, python, plain = blocks(text)
    assert (shell.language, shell.line, shell.before) == ("bash", 3, "a")
    assert [shlex.split(command) for command in shell.commands] == [["make", "demo", "PROMPT=x"]]
    assert python.marker
    assert python.marker.groups() == ("tests/a.py", "test_b")
    assert (plain.language, plain.code, plain.before) == ("", "```\n", "")


def test_a_block_without_an_end_is_found() -> None:
    with pytest.raises(AssertionError, match="line 2 is not closed"):
        list(blocks("a\n```bash\nmake\n"))
