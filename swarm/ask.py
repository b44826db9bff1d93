"""The user's subcommands: `generate`, `chat` and `status`. A door: it prints."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from hexswarm.blocking import Client, Stream
from hexswarm.cli import client_config, sampling_options
from hexswarm.client import Completion, Options
from hexswarm.errors import HexswarmError, UsageError
from hexswarm.picture import swarm_table
from hexswarm.tokenizer import Message


def generate(flags: argparse.Namespace) -> int:
    """Answer one prompt on stdout; the route and times on stderr."""
    text = sys.stdin.read().removesuffix("\n") if flags.prompt == "-" else flags.prompt
    if not text.strip():
        raise UsageError("the prompt is empty")
    prompt = text if flags.raw else [{"role": "user", "content": text}]
    options = _options(flags)
    with Client(config=client_config(flags)) as client:
        if flags.json or flags.no_stream:
            completion = client.generate(prompt, **options)
            print(json.dumps(as_json(completion)) if flags.json else completion.text)
        else:
            completion = print_stream(client.generate(prompt, stream=True, **options))
    if not flags.json:
        print(summary(completion), file=sys.stderr)
    return 0


def _options(flags: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate`, checked before anything takes time. Raises UsageError."""
    options = sampling_options(flags)
    Options(**options)
    return options


def print_stream(stream: Stream) -> Completion:
    """Print pieces as they come."""
    with stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print(flush=True)
    return stream.completion


def chat(flags: argparse.Namespace) -> int:
    """A conversation on the terminal; an empty line or /exit ends it."""
    messages: list[Message] = []
    if flags.system:
        messages.append({"role": "system", "content": flags.system})
    options = _options(flags)
    config = client_config(flags)
    with Client(config=config) as client, client.conversation() as conversation:
        print(f"{config.model}; an empty line ends the conversation", file=sys.stderr)
        while text := _ask():
            messages.append({"role": "user", "content": text})
            try:
                stream = conversation.generate(messages, stream=True, **options)
                completion = print_stream(stream)
            except HexswarmError as error:
                messages.pop()
                print(f"hexswarm: {error}", file=sys.stderr)
                continue
            messages.append({"role": "assistant", "content": completion.text})
            print(summary(completion), file=sys.stderr)
    return 0


def _ask() -> str:
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
    return "" if text == "/exit" else text


def status(flags: argparse.Namespace) -> int:
    """Who serves the model; exit status 1 if some layer has no peer."""
    config = client_config(flags)
    with Client(config=config) as client:
        view = client.snapshot()
        spec = client.spec
    peers = view.serving(spec.digest)
    missing = view.missing(spec.digest, spec.layers)
    if flags.json:
        document = view.to_json()
        document["model"] = {"name": spec.name, "digest": spec.digest, "layers": spec.layers}
        document["missing"] = [[span.first, span.end] for span in missing]
        print(json.dumps(document))
    else:
        print(swarm_table(spec, view, missing))
    return 0 if peers and not missing else 1


def summary(completion: Completion) -> str:
    """Route and times in one line."""
    return (
        f"[{completion.route} | first token {completion.ttft_s * 1e3:.0f} ms | "
        f"{completion.tokens_per_s:.1f} tokens/s | {len(completion.ids)} tokens | "
        f"{completion.finish}]"
    )


def as_json(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "ids": list(completion.ids),
        "prompt_tokens": completion.prompt_tokens,
        "reused_tokens": completion.reused_tokens,
        "finish": completion.finish,
        "ttft_s": completion.ttft_s,
        "tokens_per_s": completion.tokens_per_s,
        "route": [
            {"peer": stage.peer, "span": [stage.span.first, stage.span.end]}
            for stage in completion.route.stages
        ],
    }
