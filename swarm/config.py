"""Configuration: one frozen dataclass per role; the only reader of the environment.

A field's metadata holds its help text and, where they differ from what name and type say, its
`flag`, how to `parse` one value, and whether there may be `many`; the doors derive their flags from
it (`add_flags`, `from_flags`), so that no option is written twice.
Order of precedence: default < environment (HEXSWARM_<FIELD>) < flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hexswarm.degree import Degree
from hexswarm.errors import UsageError
from hexswarm.records import DTYPES, Span

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""The small model of the demo and the tests; see `hexswarm.store`."""

QUANTS = ("none", "int8", "int4")
"""How a peer may round the weights of its layers."""

T = TypeVar("T")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, **metadata})


def home() -> Path:
    """Folder of this user's part in a swarm: identities, remembered peers (HEXSWARM_HOME)."""
    return Path(os.environ.get("HEXSWARM_HOME") or Path.home() / ".hexswarm")


def cache() -> Path:
    """Folder of what can be made again: models, file hashes, measured speeds (HEXSWARM_CACHE)."""
    return Path(os.environ.get("HEXSWARM_CACHE") or Path.home() / ".hexswarm")


def default_bootstrap() -> tuple[str, ...]:
    """Bootstrap addresses of the environment (HEXSWARM_BOOTSTRAP, separated by commas)."""
    given = os.environ.get("HEXSWARM_BOOTSTRAP", "")
    return tuple(address.strip() for address in given.split(",") if address.strip())


def seconds(text: str) -> float:
    """Seconds of "0.25", "0.25s" or "250ms". Raises UsageError."""
    for unit, scale in (("ms", 1e-3), ("s", 1.0), ("", 1.0)):
        if text.endswith(unit):
            return scale * _number(text.removesuffix(unit), text, 'seconds, as "0.25" or "250ms"')
    raise AssertionError("every text ends with nothing")


def byte_rate(text: str) -> float:
    """Bytes per second of "1500000", "1.5MB" or "1.5MB/s". Raises UsageError."""
    digits = text.removesuffix("/s").removesuffix("B")
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(digits[-1:], 1.0)
    return scale * _number(digits.rstrip("kMG"), text, 'bytes per second, as "1.5MB"')


def byte_size(text: str) -> int:
    """Bytes of "1500000", "1.5MB" or "2GB". Raises UsageError."""
    digits = text.removesuffix("B")
    scale = {"k": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(digits[-1:], 1)
    size = scale * _number(digits.rstrip("kMG"), text, 'bytes, as "512MB"')
    if not math.isfinite(size):
        raise UsageError(f"{text!r} is not a number of bytes")
    return int(size)


def yes_or_no(text: str) -> bool:
    """True of "1", "yes", "true" or "on", False of their opposites. Raises UsageError."""
    word = text.lower()
    if word not in _YES + _NO:
        raise UsageError(f"{text!r} is neither yes nor no")
    return word in _YES


_YES, _NO = ("1", "yes", "true", "on"), ("0", "no", "false", "off")


def _number(digits: str, text: str, what: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise UsageError(f"{text!r} is not a number of {what}") from None


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What every process that joins a swarm needs."""

    bootstrap: tuple[str, ...] = option(
        (), "address of a node of the swarm, /ip4/.../tcp/.../p2p/...; may be given several times"
    )
    home: Path | None = option(
        None, "folder for identity and remembered peers (default: ~/.hexswarm)"
    )

    @property
    def folder(self) -> Path:
        return self.home or home()

    @property
    def cache(self) -> Path:
        return cache()


@dataclass(frozen=True, slots=True)
class ListenConfig(NetworkConfig):
    """What a process needs that others call."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    port: int = option(0, "TCP port to listen on; 0 takes a free one")
    identity: Path | None = option(None, "file with the secret key; made when missing")
    announce: tuple[str, ...] = option(
        (), "address under which others reach this node, if it differs from host and port"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UsageError(f"port {self.port} is outside 0-65535")


@dataclass(frozen=True, slots=True)
class BootstrapConfig(ListenConfig):
    """`hexswarm bootstrap`."""

    port: int = option(31337, "TCP port to listen on; 0 takes a free one")


@dataclass(frozen=True, slots=True)
class PeerConfig(ListenConfig):
    """`hexswarm peer`."""

    model: str = option(DEFAULT_MODEL, "Hub id, folder of safetensors, or GGUF file")
    span: Span | None = option(
        None, "layers to serve, FIRST:END; default: as many as fit where the swarm needs them"
    )
    memory: int | None = option(
        None,
        'memory for the weights and KV of layers chosen without --span, as "8GB" (default: four '
        "fifths of what is free)",
        parse=byte_size,
    )
    follow: bool = option(
        True, "move as other peers advise, where that gains; never with --span", parse=yes_or_no
    )
    hole_s: float = option(
        15.0, "seconds that layers may have no holder until a peer without --span moves there"
    )
    device: str = option("auto", "cpu, cuda, cuda:N or auto")
    dtype: str = option("auto", "float32, bfloat16, float16 or auto (float32 on CPU)")
    quant: str = option("none", "round the layers' weights on load: none, int8 or int4")
    kv_tokens: int = option(16384, "tokens of all sessions for which KV memory is kept")
    tensor_parallel: Degree = option(
        Degree(),
        "cut the layers over devices of this machine: a number, auto for all GPUs, shares as 3:1 "
        "for unequal ones, or off",
        parse=Degree.parse,
    )
    group: str = option(
        "off",
        "cut the layers over peers of the LAN: a name for those that are to be together, auto for "
        "where it pays, or off",
    )
    group_size: int = option(2, "members of a group with a name; 0 for all that are there")
    group_port: int = option(0, "TCP port for the members of a group; 0 takes a free one")
    threads: int = option(0, "CPU threads for the layers; 0 measures how many are of use")
    lease_s: float = option(60.0, "seconds after which an idle session loses its KV")
    prefix_cache: bool = option(
        True, "keep the KV of prompts, until room is needed, for the next one of the same client"
    )
    journal: int | None = option(
        None,
        'memory for what was sent on, kept to replace a lost stage, as "512MB" (default: that, or '
        "an eighth of what is free)",
        parse=byte_size,
    )
    drain_s: float = option(25.0, "seconds that running sessions get to end after SIGTERM")
    metrics_port: int | None = option(
        None, "serve numbers for Prometheus on this port of the loopback; 0 takes a free one"
    )

    def __post_init__(self) -> None:
        ListenConfig.__post_init__(self)
        if self.metrics_port is not None and not 0 <= self.metrics_port < 1 << 16:
            raise UsageError(
                f"{self.metrics_port} is not a port",
                remedy="--metrics-port takes 1 to 65535, or 0 for any that is free",
            )
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}", remedy=f"use {', '.join(DTYPES)}")
        if self.quant not in QUANTS:
            raise UsageError(f"unknown quant {self.quant!r}", remedy=f"use {', '.join(QUANTS)}")
        if self.kv_tokens < 16:
            raise UsageError("kv_tokens is at least 16")
        self._check_group()
        if self.memory is not None and not 0 < self.memory < 1 << 60:
            raise UsageError("memory is a positive number of bytes")
        if not 0 <= self.hole_s <= 3600:
            raise UsageError("hole_s is within 0-3600")
        if self.journal is not None and not 0 <= self.journal < 1 << 50:
            raise UsageError("a journal has 0 bytes or more")
        if not 1 <= self.lease_s <= 86400 or not 0 <= self.drain_s <= 3600:
            raise UsageError("lease_s is within 1-86400 and drain_s within 0-3600")

    def _check_group(self) -> None:
        if not 1 <= len(self.group) <= 32 or not self.group.isprintable():
            raise UsageError("a group has a printable name of 1 to 32 characters")
        if self.group_size != 0 and not 2 <= self.group_size <= 64:
            raise UsageError(
                f"a group has 2 to 64 members, not {self.group_size}",
                remedy="--group-size 0 takes all that are there",
            )
        if not 0 <= self.group_port < 1 << 16:
            raise UsageError(f"group port {self.group_port} is outside 0-65535")
        if self.group != "off" and self.tensor_parallel != Degree():
            raise UsageError(
                "--group and --tensor-parallel exclude each other",
                remedy="a member of a group has one device",
            )


@dataclass(frozen=True, slots=True)
class ClientConfig(NetworkConfig):
    """`hexswarm generate`, `chat`, `status` and the Python client."""

    model: str = option(DEFAULT_MODEL, "Hub id, folder of safetensors, or GGUF file")
    connect_s: float = option(8.0, "seconds to wait for a peer to answer a new session")
    silence_s: float = option(8.0, "seconds without a sign of life after which a peer is lost")
    repair_s: float = option(30.0, "seconds to find others when peers of an answer are lost")
    patience_s: float = option(30.0, "seconds to wait for room where all peers are full")

    def __post_init__(self) -> None:
        for name in ("connect_s", "silence_s", "repair_s", "patience_s"):
            if not 0 <= getattr(self, name) <= 86400:
                raise UsageError(f"{name} is within 0-86400")


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Give `parser` one flag for each option of the dataclass `config`."""
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        if "help" not in item.metadata:
            continue
        kind, many = _element(hints[item.name], item.metadata)
        if hints[item.name] is bool:
            name = item.name.replace("_", "-")
            parser.add_argument(
                f"--{name}",
                dest=item.name,
                default=None,
                action=argparse.BooleanOptionalAction,
                help=f"{item.metadata['help']} (default: {item.default})",
            )
            continue
        parser.add_argument(
            item.metadata.get("flag", "--" + item.name.replace("_", "-")),
            dest=item.name,
            default=None,
            type=_for_argparse(kind),
            action="append" if many else "store",
            metavar=item.metadata.get("metavar", item.name.upper()),
            help=item.metadata["help"]
            + ("" if item.default in (None, ()) else f" (default: {item.default})"),
        )


def from_flags(
    config: type[T], flags: argparse.Namespace, environment: Mapping[str, str] | None = None
) -> T:
    """Build `config` from parsed flags and HEXSWARM_<FIELD> variables.

    Raises UsageError for values that do not parse or do not fit.
    """
    environment = os.environ if environment is None else environment
    hints = typing.get_type_hints(config)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        given = getattr(flags, item.name, None)
        kind, many = _element(hints[item.name], item.metadata)
        name = "HEXSWARM_" + item.name.upper()
        if given is None and "help" in item.metadata and environment.get(name):
            try:
                words = environment[name].split(",") if many else [environment[name]]
                given = [kind(word) for word in words]
            except ValueError as error:
                raise UsageError(f"{name}: {error}") from error
            given = given if many else given[0]
        if given is not None:
            values[item.name] = tuple(given) if many else given
    return config(**values)


def _for_argparse(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """`kind` with its own words of complaint, which argparse keeps of one error type only."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


def _element(hint: Any, metadata: Mapping[str, Any]) -> tuple[Any, bool]:
    """The parser of one value of a field of type `hint`, and whether many are allowed."""
    if "parse" in metadata:
        return metadata["parse"], metadata.get("many", False)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return (Span.parse if hint is Span else hint), False
