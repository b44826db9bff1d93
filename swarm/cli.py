"""The command `hexswarm`: reads argv, builds a frozen config, runs one door.

    generate | chat | status          for who asks
    route | why                       for who wants to know how it is routed
    peer                              for who lends a GPU   (hexswarm.peer.cli)
    bootstrap                         for who runs a swarm  (hexswarm.bootstrap.cli)
    plan | simulate                   for who owns a cluster (simulate: hexswarm.simulator.cli)
    demo                              a whole swarm on this machine

Subcommands of other folders are loaded when they are called. Every error that we expect ends in
one line on stderr and its exit status; a traceback is a bug.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hexswarm.config import (
    BootstrapConfig,
    ClientConfig,
    PeerConfig,
    add_flags,
    from_flags,
)
from hexswarm.errors import HexswarmError, UsageError
from hexswarm.log import set_up
from hexswarm.options import Options, Wishes
from hexswarm.plan_options import PlanOptions, SimulateOptions
from hexswarm.version import __version__

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    try:
        flags = _parser().parse_args(argv)
        set_up(flags.verbose)
        door = importlib.import_module(flags.module)
        status: int = getattr(door, flags.function)(flags)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `hexswarm status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except HexswarmError as error:
        return complain(error)
    except BaseExceptionGroup as group:
        expected = group.subgroup(HexswarmError)
        first = _first(expected) if expected is not None else None
        if first is None or group.split(HexswarmError)[1] is not None:
            raise
        return complain(first)


def complain(error: HexswarmError) -> int:
    """One line for the person; the exit status."""
    print(f"hexswarm: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_status


def _first(group: BaseException) -> HexswarmError | None:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group if isinstance(group, HexswarmError) else None


class _Parser(argparse.ArgumentParser):
    """Complains in our one line instead of argparse's usage and message."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hexswarm",
        description="Large language models on GPUs that volunteers own.",
        epilog="Every peer of a route can read the text it computes; see README.",
    )
    parser.add_argument("--version", action="version", version=f"hexswarm {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more on stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, module: str, function: str, help: str, config: type | None) -> Any:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(module=module, function=function)
        if config is not None:
            add_flags(sub, config)
        return sub

    ask = command("generate", "hexswarm.ask", "generate", "answer one prompt", ClientConfig)
    ask.add_argument("prompt", help="the text; - reads standard input")
    ask.add_argument("--raw", action="store_true", help="complete the text instead of chatting")
    ask.add_argument("--no-stream", action="store_true", help="print the answer when complete")
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(ask, Options)
    chat = command("chat", "hexswarm.ask", "chat", "talk with the model", ClientConfig)
    chat.add_argument("--system", default="", help="system message")
    add_flags(chat, Options)
    status = command("status", "hexswarm.ask", "status", "who serves what", ClientConfig)
    status.add_argument("--json", action="store_true", help="print one JSON object")
    route = command("route", "hexswarm.ask", "route", "the ring of a request", ClientConfig)
    route.add_argument("--json", action="store_true", help="print one JSON object")
    route.add_argument("--svg", type=Path, metavar="FILE", help="draw the swarm and the ring")
    _dry_flags(route)
    why = command("why", "hexswarm.ask", "why", "what decided about a route", ClientConfig)
    why.add_argument("--json", action="store_true", help="print one JSON object")
    why.add_argument(
        "--trace", metavar="SESSION", help="where the time of that answer went; `last`: the newest"
    )
    _dry_flags(why)
    command("peer", "hexswarm.peer.cli", "run", "lend this machine to a swarm", PeerConfig)
    command(
        "bootstrap",
        "hexswarm.bootstrap.cli",
        "run",
        "a well-known node of a swarm",
        BootstrapConfig,
    )
    plan = command(
        "plan", "hexswarm.plan_door", "plan", "who should hold which layers", PlanOptions
    )
    plan.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan as JSON")
    _cluster_flags(plan, "draw the plan")
    run = command(
        "simulate", "hexswarm.simulator.cli", "run", "what a plan is worth", SimulateOptions
    )
    _cluster_flags(run, "draw latencies, goodput and the use of machines")
    demo = command("demo", "hexswarm.demo", "run", "a whole swarm on this machine", None)
    demo.add_argument("prompt", nargs="?", default="What is the capital of France?")
    demo.add_argument("--model", default=None, help="Hub id, folder of safetensors, or GGUF file")
    add_flags(demo, Options)
    return parser


def _cluster_flags(parser: argparse.ArgumentParser, drawing: str) -> None:
    parser.add_argument("cluster", type=Path, metavar="CLUSTER.json", help="see docs/planning.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--svg", type=Path, metavar="FILE", help=drawing)


def _dry_flags(parser: argparse.ArgumentParser) -> None:
    """What `route` and `why` need to know of a request that is not made."""
    parser.add_argument("prompt", nargs="?", default=None, help="a text of the length in question")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="instead of a text")
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="answer length")
    add_flags(parser, Wishes)


def given(options: type[Wishes], flags: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of a request out of parsed flags, checked before anything takes time.

    The environment says nothing about single requests. Raises UsageError.
    """
    checked = from_flags(options, flags, {})
    return {item.name: getattr(checked, item.name) for item in dataclasses.fields(options)}


def client_config(flags: argparse.Namespace) -> ClientConfig:
    return from_flags(ClientConfig, flags)


if __name__ == "__main__":
    sys.exit(main())
