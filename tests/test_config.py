"""Flags and environment both lead to the same config, and bad values to UsageError."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hexswarm.config import (
    BootstrapConfig,
    ClientConfig,
    ListenConfig,
    NetworkConfig,
    PeerConfig,
    add_flags,
    from_flags,
    home,
)
from hexswarm.errors import UsageError
from hexswarm.records import Span

CONFIGS = [NetworkConfig, ListenConfig, BootstrapConfig, PeerConfig, ClientConfig]


def read(config: Any, words: str = "", environment: Mapping[str, str] | None = None) -> Any:
    """What the door of `config` makes of a command line."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, config)
    return from_flags(config, parser.parse_args(words.split()), environment or {})


@pytest.mark.parametrize("config", CONFIGS)
def test_without_flags_the_defaults_count(config: Any) -> None:
    assert read(config) == config()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_is_a_flag_with_its_help(config: Any) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    text = " ".join(parser.format_help().split())
    for item in dataclasses.fields(config):
        assert "--" + item.name.replace("_", "-") in text
        assert " ".join(item.metadata["help"].split()) in text


def test_flags_are_converted_by_the_type_of_the_field() -> None:
    words = (
        "--bootstrap /ip4/1.2.3.4/tcp/1 --bootstrap /ip4/5.6.7.8/tcp/2 --home /tmp/h --port 4001 "
        "--span 0:10 --kv-tokens 4096 --lease-s 60 --threads 1"
    )
    config = read(PeerConfig, words)
    assert config.bootstrap == ("/ip4/1.2.3.4/tcp/1", "/ip4/5.6.7.8/tcp/2")
    assert (config.home, config.folder) == (Path("/tmp/h"), Path("/tmp/h"))
    assert (config.port, config.span, config.threads) == (4001, Span(0, 10), 1)
    assert (config.kv_tokens, config.lease_s) == (4096, 60.0)


def test_the_environment_beats_the_default_and_a_flag_beats_both() -> None:
    environment = {"HEXSWARM_PORT": "5000", "HEXSWARM_SPAN": "3:7", "HEXSWARM_BOOTSTRAP": "/a,/b"}
    config = read(PeerConfig, "", environment)
    assert (config.port, config.span, config.bootstrap) == (5000, Span(3, 7), ("/a", "/b"))
    config = read(PeerConfig, "--port 6000 --bootstrap /c", environment)
    assert (config.port, config.span, config.bootstrap) == (6000, Span(3, 7), ("/c",))


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert read(PeerConfig, "", {"HEXSWARM_PORT": "", "HEXSWARM_SPAN": ""}) == PeerConfig()


@pytest.mark.parametrize(
    "environment",
    [
        {"HEXSWARM_PORT": "many"},
        {"HEXSWARM_PORT": "65536"},
        {"HEXSWARM_SPAN": "7:3"},
        {"HEXSWARM_DTYPE": "int3"},
        {"HEXSWARM_KV_TOKENS": "0"},
        {"HEXSWARM_LEASE_S": "0"},
        {"HEXSWARM_DRAIN_S": "-1"},
    ],
    ids=str,
)
def test_a_bad_variable_is_a_usage_error(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        read(PeerConfig, "", environment)


def test_yes_or_no() -> None:
    """As two flags, and as a word in the environment."""
    assert PeerConfig().follow
    assert not read(PeerConfig, "--no-follow", {"HEXSWARM_FOLLOW": "1"}).follow
    assert read(PeerConfig, "--follow", {"HEXSWARM_FOLLOW": "no"}).follow
    assert not read(PeerConfig, "", {"HEXSWARM_FOLLOW": "off"}).follow
    with pytest.raises(UsageError):
        read(PeerConfig, "", {"HEXSWARM_FOLLOW": "perhaps"})


@pytest.mark.parametrize(
    "words", ["--port -1", "--hole-s -1", "--dtype int3", "--kv-tokens 3", "--lease-s 0"]
)
def test_a_flag_out_of_range_is_a_usage_error(words: str) -> None:
    with pytest.raises(UsageError):
        read(PeerConfig, words)


@pytest.mark.parametrize(
    "words",
    [
        "--group-size 1",
        "--group-size 65",
        "--group-port 70000",
        f"--group {33 * 'x'}",
        "--group home --tensor-parallel 2",
    ],
)
def test_a_group_that_cannot_be_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match="group"):
        read(PeerConfig, words)


def test_a_peer_is_in_no_group_unless_it_says_so() -> None:
    assert (PeerConfig().group, PeerConfig().group_size) == ("off", 2)
    assert read(PeerConfig, "--group home --group-size 0").group_size == 0


@pytest.mark.parametrize("words", ["--port many", "--span 7:3", "--span ten", "--lease-s soon"])
def test_a_flag_that_does_not_parse_is_refused_by_the_parser(words: str) -> None:
    with pytest.raises((argparse.ArgumentError, UsageError)):
        read(PeerConfig, words)


def test_the_home_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEXSWARM_HOME", "/tmp/elsewhere")
    assert home() == Path("/tmp/elsewhere")
    assert NetworkConfig().folder == Path("/tmp/elsewhere")
    monkeypatch.delenv("HEXSWARM_HOME")
    assert home() == Path.home() / ".hexswarm"


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1500", 1500), ("2kB", 2048), ("512MB", 512 << 20), ("1.5G", 3 << 29)],
)
def test_the_size_of_a_journal(text: str, size: int) -> None:
    assert read(PeerConfig, f"--journal {text}").journal == size
    assert read(PeerConfig, "", {"HEXSWARM_JOURNAL": text}).journal == size


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf", "1e30"])
def test_a_journal_without_a_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        read(PeerConfig, "", {"HEXSWARM_JOURNAL": text})


@pytest.mark.parametrize("name", ["connect_s", "silence_s", "repair_s", "patience_s"])
def test_a_client_waits_for_a_time(name: str) -> None:
    assert read(ClientConfig, f"--{name.replace('_', '-')} 3") != ClientConfig()
    for wrong in (-1.0, float("nan"), 1e9):
        with pytest.raises(UsageError, match=name):
            ClientConfig(**{name: wrong})
