"""The command `hexswarm`: reads argv, builds a frozen config, runs one door.

    generate | chat | status          for who asks
    peer                              for who lends a GPU   (hexswarm.peer.cli)
    bootstrap                         for who runs a swarm  (hexswarm.bootstrap.cli)
    demo                              a whole swarm on this machine

Subcommands of other folders are loaded when they are called. Every error that we expect ends in
one line on stderr and its exit status; a traceback is a bug.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
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
        epilog="Every peer of a route can read the text it computes; see README, Privacy.",
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
    _sampling_flags(ask)
    chat = command("chat", "hexswarm.ask", "chat", "talk with the model", ClientConfig)
    chat.add_argument("--system", default="", help="system message")
    _sampling_flags(chat)
    status = command("status", "hexswarm.ask", "status", "who serves what", ClientConfig)
    status.add_argument("--json", action="store_true", help="print one JSON object")
    command("peer", "hexswarm.peer.cli", "run", "lend this machine to a swarm", PeerConfig)
    command(
        "bootstrap",
        "hexswarm.bootstrap.cli",
        "run",
        "a well-known node of a swarm",
        BootstrapConfig,
    )
    demo = command("demo", "hexswarm.demo", "run", "a whole swarm on this machine", None)
    demo.add_argument("prompt", nargs="?", default="What is the capital of France?")
    demo.add_argument("--model", default=None, help="Hub id, folder of safetensors, or GGUF file")
    _sampling_flags(demo)
    return parser


def _sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags named like the options of `hexswarm.generate`."""
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT")
    parser.add_argument("--seed", type=int, default=None, metavar="N")


def sampling_options(flags: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate` out of parsed flags."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: getattr(flags, name) for name in (*names, "stop", "seed")}


def client_config(flags: argparse.Namespace) -> ClientConfig:
    return from_flags(ClientConfig, flags)


if __name__ == "__main__":
    sys.exit(main())
