"""The user's subcommands: `generate`, `chat`, `status`, `route` and `why`. A door: it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hexswarm.blocking import Client, Stream
from hexswarm.cli import client_config, given
from hexswarm.conversation import Completion
from hexswarm.errors import HexswarmError, NoRoute, UsageError
from hexswarm.explained import (
    repair_text,
    route_json,
    route_text,
    trace_json,
    trace_text,
    why_json,
    why_text,
)
from hexswarm.groups import group_json, groups
from hexswarm.map import swarm_map
from hexswarm.options import Options, Wishes
from hexswarm.picture import swarm_table
from hexswarm.planning import Plan
from hexswarm.records import Route
from hexswarm.router.network import Snapshot
from hexswarm.tokenizer import Message
from hexswarm.trace import load, repair_json

PROMPT_TOKENS = 128
"""Length of the prompt that `route` and `why` think of if none is given."""


def generate(flags: argparse.Namespace) -> int:
    """Answer one prompt on stdout; the route and times on stderr."""
    text = sys.stdin.read().removesuffix("\n") if flags.prompt == "-" else flags.prompt
    if not text.strip():
        raise UsageError("the prompt is empty")
    prompt = text if flags.raw else [{"role": "user", "content": text}]
    options = given(Options, flags)
    with Client(config=client_config(flags)) as client:
        if flags.json or flags.no_stream:
            completion = client.generate(prompt, **options)
            print(json.dumps(as_json(completion)) if flags.json else completion.text)
        else:
            completion = print_stream(client.generate(prompt, stream=True, **options))
    if not flags.json:
        print(*map(repair_text, completion.mends), summary(completion), sep="\n", file=sys.stderr)
    return 0


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
    options = given(Options, flags)
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
            print(
                *map(repair_text, completion.mends), summary(completion), sep="\n", file=sys.stderr
            )
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
        document["groups"] = [group_json(item) for item in groups(view.of_model(spec.digest))]
        document["missing"] = [[span.first, span.end] for span in missing]
        print(json.dumps(document))
    else:
        print(swarm_table(spec, view, missing))
    return 0 if peers and not missing else 1


def route(flags: argparse.Namespace) -> int:
    """The ring that a request would take, without taking it."""
    wishes = given(Wishes, flags)
    with Client(config=client_config(flags)) as client:
        tokens = _prompt_tokens(client, flags)
        try:
            plan = client.plan(tokens, flags.new_tokens, **wishes)
        except NoRoute:
            if flags.svg:
                _draw(flags.svg, client, client.snapshot(), None)
            raise
        if flags.svg:
            _draw(flags.svg, client, plan.snapshot, plan.route)
        print(json.dumps(_plan_json(client, plan)) if flags.json else route_text(plan.budget()))
    return 0


def _plan_json(client: Client, plan: Plan) -> dict[str, Any]:
    return {
        "model": {"name": client.spec.name, "digest": client.spec.digest},
        "prompt_tokens": plan.request.prompt_tokens,
        "new_tokens": plan.request.new_tokens,
        **route_json(plan.budget()),
    }


def _prompt_tokens(client: Client, flags: argparse.Namespace) -> int:
    """How long the prompt is that the question is about."""
    if flags.prompt_tokens is not None:
        if flags.prompt is not None or flags.prompt_tokens < 1:
            raise UsageError("give a prompt, or a positive number of --prompt-tokens")
        return int(flags.prompt_tokens)
    if flags.prompt is None:
        return PROMPT_TOKENS
    return client.count([{"role": "user", "content": flags.prompt}])


def _draw(path: Path, client: Client, view: Snapshot, chosen: Route | None) -> None:
    spec = client.spec
    try:
        path.write_text(
            swarm_map(view, spec.digest, spec.layers, chosen, client.coordinates), "utf-8"
        )
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def why(flags: argparse.Namespace) -> int:
    """Why a request takes its route, or where the time of an answer went.

    Exit status 1 if there is no route.
    """
    if flags.trace is not None:
        trace = load(client_config(flags).folder / "traces", flags.trace)
        print(json.dumps(trace_json(trace)) if flags.json else trace_text(trace))
        return 0
    wishes = given(Wishes, flags)
    with Client(config=client_config(flags)) as client:
        _, explanation = client.explain(_prompt_tokens(client, flags), flags.new_tokens, **wishes)
    print(json.dumps(why_json(explanation)) if flags.json else why_text(explanation))
    return 0 if explanation.chosen is not None else 1


def summary(completion: Completion) -> str:
    """Route and times in one line."""
    return (
        f"[{completion.route} | first token {completion.ttft_s * 1e3:.0f} ms | "
        f"{completion.tokens_per_s:.1f} tokens/s | {len(completion.ids)} tokens | "
        f"{completion.finish} | {completion.session}]"
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
        "tpot_s": completion.tpot_s,
        "predicted": {
            "ttft_s": completion.route.ttft_s,
            "tpot_s": completion.route.tpot_s,
            "tpot_p95_s": completion.route.tpot_p95_s,
            "price": completion.route.price,
        },
        "session": completion.session,
        "mends": [repair_json(item) for item in completion.mends],
        "route": [
            {"peer": stage.peer, "span": [stage.span.first, stage.span.end]}
            for stage in completion.route.stages
        ],
    }
