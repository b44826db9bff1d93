"""mypy --strict on the parts that are held to it, in the shape in which they are installed.

The folders of the repository carry other names than the packages (`router/` is `hexswarm.router`),
so mypy must look at the installed tree; its messages are turned back into paths of the repository.
A script (`python tests/typecheck.py [module...]`) and a test (`pytest tests/typecheck.py`).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

STRICT_PEER = (
    *("actions", "admission", "cache", "load", "neighbours", "pace", "promises", "scheduler"),
    *("blocks", "leases"),
    *("sessions", "stage", "steps", "tracing", "journal", "order", "resume"),
    *("cuts", "shares", "slices", "division", "restarts", "away", "pulse"),
    *("hosting", "ranks", "rank", "fitting", "assembly", "led", "following"),
    *("gauges", "placement", "advising", "foresight", "attempts"),
    *(f"groups.{name}" for name in ("actions", "division", "formation", "invitation", "leader")),
    *(f"groups.{name}" for name in ("member", "neighbourhood", "policy", "standing", "teams")),
    *(f"groups.{name}" for name in ("checks", "near", "streams", "talk", "words")),
    *("collective", "exchange", "patience", "reduction", "spreading"),
)
"""Modules of peer/ that are held to strict typing; swarm/ and router/ are as a whole."""


def modules() -> list[str]:
    """The modules to check, as they are imported."""
    folders = {
        "hexswarm": "swarm",
        "hexswarm.transports": "swarm/transports",
        "hexswarm.router": "router",
        "hexswarm.router.placement": "router/placement",
        "hexswarm.simulator": "simulator",
        "hexswarm.bootstrap": "bootstrap",
    }
    found = [
        package if path.stem == "__init__" else f"{package}.{path.stem}"
        for package, folder in folders.items()
        for path in sorted((ROOT / folder).glob("*.py"))
    ]
    return [*found, *(f"hexswarm.peer.{name}" for name in STRICT_PEER)]


def run(names: Sequence[str]) -> tuple[int, str]:
    """mypy's exit status and its words."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
    for name in names:
        command += ["-m", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, _in_repository(done.stdout + done.stderr)


def _in_repository(text: str) -> str:
    """Replace paths of the installed tree by those of the repository."""
    text = re.sub(r"(?m)^\S*?\bhexswarm/(?=(peer|router|simulator|kernels|bootstrap)/)", "", text)
    return re.sub(r"(?m)^\S*?\bhexswarm/(?=\S+\.py)", "swarm/", text)


@pytest.mark.timeout(600)
def test_types() -> None:
    status, words = run(modules())
    assert status == 0, words


if __name__ == "__main__":
    status, words = run(sys.argv[1:] or modules())
    sys.stdout.write(words)
    sys.exit(status)
