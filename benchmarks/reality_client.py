"""The client of `reality.py`: one JSON object a line each way, as that of `lab.py`.

    python benchmarks/reality_client.py ADDRESS HOME

`ask` makes several requests at the same moment; `census` tells what the directory says now, without
what this client has learnt of peers since: the prediction shall be made of announcements alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lab

from hexswarm.client import AsyncClient
from hexswarm.config import DEFAULT_MODEL
from hexswarm.router.network import snapshot


async def serve_parent(bootstrap: str, home: Path) -> None:
    """Answer the parent's requests, one line each, until its pipe ends."""
    async with AsyncClient([bootstrap], model=DEFAULT_MODEL, home=home) as client:
        print(json.dumps({"ready": True}), flush=True)
        acts = {"ask": _ask, "census": _census, "view": lab._view}
        while line := await asyncio.to_thread(sys.stdin.readline):
            request = json.loads(line)
            print(json.dumps(await acts[request["op"]](client, request)), flush=True)


async def _ask(client: AsyncClient, request: Mapping[str, Any]) -> dict[str, Any]:
    """All prompts at once, each cut or repeated to so many tokens."""
    count = request["prompt_tokens"]
    asked = []
    for text in request["prompts"]:
        ids = itertools.islice(itertools.cycle(client.encode(text)), count)
        asked.append({"prompt": list(ids), "options": request["options"]})
    return {"answers": await asyncio.gather(*(lab._ask(client, one) for one in asked))}


async def _census(client: AsyncClient, request: Mapping[str, Any]) -> dict[str, Any]:
    """Announcements as they were made, and the ways that this client knows."""
    await client._member.refresh(client.spec_digest)
    known = await client.snapshot()
    raw = snapshot(client._member.alive(), known.links, known.taken_s, client=known.client)
    return {"client": known.client, **raw.to_json()}


if __name__ == "__main__":
    asyncio.run(serve_parent(sys.argv[1], Path(sys.argv[2])))
