"""`hexswarm plan` and `hexswarm simulate` as processes of their own. They need no swarm.

What they answer is held by tests/swarm/test_plan_door.py; here is what only a process shows: its
exit status, what goes to which stream, Ctrl-C, a terminal.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.end_to_end.swarm import complaint, environment, hexswarm

pytestmark = pytest.mark.end_to_end

EXAMPLE = str(Path(__file__).parents[2] / "docs" / "examples" / "cluster.json")


def test_plan_and_simulation_of_the_readme(tmp_path: Path) -> None:
    """The plan holds every layer, and the simulator serves it."""
    plan, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    made = hexswarm("plan", EXAMPLE, "--seconds", "1", "-o", str(plan), "--svg", str(picture))
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    for word in ("office-3", "flow ", "% of the bound", "expected ", "binds "):
        assert word in made.stdout
    said = json.loads(plan.read_text("utf-8"))
    spans = [*said["nodes"].values(), *(group["layers"] for group in said["groups"])]
    assert {layer for span in spans if span for layer in range(*span)} == set(range(32))
    assert picture.read_text("utf-8").startswith("<svg")
    words = ("simulate", EXAMPLE, "--plan", str(plan), "--rate", "0.5")
    run = hexswarm(*words, "--seconds", "40", "--warmup", "5")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "goodput" in run.stdout


def test_ctrl_c_prints_the_best_so_far() -> None:
    program = (
        "import os, signal, sys\n"
        "from hexswarm import plan_door\n"
        "from hexswarm.cli import main\n"
        "def best(self, words, before=plan_door.Watch.best):\n"
        "    before(self, words)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    plan_door.Watch.best = before\n"
        "plan_door.Watch.best = best\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", EXAMPLE, "--seconds", "60", "--json"],
        env=environment(), capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["figures"]["flow_tokens_per_s"] > 0


def test_a_terminal_sees_how_far_the_search_is() -> None:
    """A bar with the best so far on the terminal; the table alone on standard output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    words = ("plan", EXAMPLE, "--seconds", "1")
    with subprocess.Popen(
        [sys.executable, "-m", "hexswarm.cli", *words],
        env=environment(), stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = _read_all(ours)
        assert process.stdout is not None
        table = process.stdout.read()
    assert process.returncode == 0, shown
    assert "searching:" in shown
    assert "best " in shown
    assert "searching" not in table
    assert "flow " in table


def _read_all(terminal: int) -> str:
    """Until the other side is closed, which Linux tells as an error."""
    parts = []
    try:
        while part := os.read(terminal, 65536):
            parts.append(part)
    except OSError:
        pass
    os.close(terminal)
    return b"".join(parts).decode("utf-8", "replace")


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = hexswarm("plan", str(tmp_path / "none.json"))
    assert "cannot be read" in complaint(done)
    assert done.returncode == 2
