"""The lines of the README that make a private swarm of two machines, executed as they stand.

Both machines are this one: each node gets a state folder of its own, 0.0.0.0 becomes loopback and
the port a free one; nothing else of the lines is changed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hexswarm.demo import READY_S, Process
from tests.end_to_end.swarm import hexswarm

pytestmark = pytest.mark.end_to_end

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def lines_marked(test: str) -> list[list[str]]:
    """The words of the README's block that names this test."""
    block = re.search(rf"<!-- executed by \S+::{test} -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert block, f"the README has no block for {test}"
    lines = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    return [words[1:] for words in lines if words and words[0] == "hexswarm"]


def adapted(words: list[str], address: str) -> list[str]:
    loopback = {"0.0.0.0": "127.0.0.1", "31337": "0", "ADDRESS": address}
    return [loopback.get(word, word) for word in words]


class TwoMachines:
    """The nodes of the block, each with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[Process] = []
        self.address = ""

    def run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """A command as a person runs it; the nodes are processes of their own as well."""
        return subprocess.run(
            [sys.executable, "-m", "hexswarm.cli", *adapted(words, self.address)],
            env=self._environment("client"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=self.folder,
        )

    def run_warm(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """The same, less the seconds of its imports."""
        known = ("--home", str(self.folder / "client"))
        return hexswarm(*adapted(words, self.address), *known, cwd=self.folder)

    def start(self) -> None:
        """Bootstrap and both peers."""
        bootstrap, *peers = lines_marked("test_private_swarm_of_the_readme")[:3]
        seed = self._spawn(bootstrap)
        lines = seed.wait_for("/p2p/", READY_S)
        self.address = next(line for line in lines if "/p2p/" in line)
        for node in [self._spawn(words) for words in peers]:
            node.wait_for("address", READY_S)

    def stop(self) -> list[int]:
        return [node.end() for node in self.nodes]

    def _spawn(self, words: list[str]) -> Process:
        name = f"node-{len(self.nodes)}"
        log = self.folder / f"{name}.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "hexswarm.cli", *adapted(words, self.address)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self._environment(name),
                bufsize=0,
            )
        self.nodes.append(Process(name, process, log))
        return self.nodes[-1]

    def _environment(self, name: str) -> dict[str, str]:
        home = str(self.folder / name)
        return {**os.environ, "HEXSWARM_HOME": home, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoMachines]:
    machines = TwoMachines(tmp_path_factory.mktemp("machines"))
    try:
        machines.start()
        yield machines
    finally:
        statuses = machines.stop()
    assert statuses == [0, 0, 0]


def test_private_swarm_of_the_readme(machines: TwoMachines) -> None:
    *_, ask = lines_marked("test_private_swarm_of_the_readme")
    answer = machines.run(ask)
    assert answer.returncode == 0, answer.stderr
    assert "Paris" in answer.stdout


def test_status_of_the_readme(machines: TwoMachines) -> None:
    (words,) = lines_marked("test_status_of_the_readme")
    status = machines.run_warm(words)
    assert status.returncode == 0, status.stderr
    assert "every layer is served; 2 peer(s)" in status.stdout


def test_limits_of_the_readme(machines: TwoMachines) -> None:
    answer, dry, why, trace = map(machines.run_warm, lines_marked("test_limits_of_the_readme"))
    for done in (answer, dry, why, trace):
        assert done.returncode == 0, done.stderr
    assert "0:15" in dry.stdout
    assert (machines.folder / "map.svg").read_text(encoding="utf-8").startswith("<svg")
    assert "the cheapest of all routes keeps the limits" in why.stdout
    for word in ("compute", "queue", "link"):
        assert word in trace.stdout
