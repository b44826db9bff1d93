"""A mixture of experts on a GPU: `engine.py --device cuda --shape moe`.

Layers as Qwen3-30B-A3B has them (128 experts of 768, 8 for a token). *Error*: hidden states after a
prompt and a decode step of several sessions in float32 against transformers', relative norm. Times
are of decode steps in bfloat16 as one graph, with the host's share; beside them the floor, which
reads only the experts that some row chose, for rows that choose independently.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from engine_gpu import BLOCK, clocked, free, say, tables, timed
from transformers import Qwen3MoeConfig, Qwen3MoeModel

from hexswarm.kernels.ragged import Extent, ragged
from hexswarm.peer.kv import KvPool
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.shard import Shard
from hexswarm.records import Span

EXPERTS, CHOSEN, HIDDEN, WIDTH, PROMPT, SESSIONS = 128, 8, 2048, 768, 24, 5


def config(layers: int, small: bool) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=64 if small else HIDDEN,
        moe_intermediate_size=32 if small else WIDTH,
        intermediate_size=6144,
        num_experts=16 if small else EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        num_hidden_layers=layers,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 4,
        head_dim=32 if small else 128,
        vocab_size=1000,
        max_position_embeddings=1 << 16,
        rms_norm_eps=1e-6,
    )


def model(layers: int, dtype: torch.dtype, device: str) -> Any:
    """Random layers of transformers, without the final norm."""
    torch.manual_seed(0)
    with torch.device(device):
        built = Qwen3MoeModel(config(layers, device == "cpu")).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5)
    built.norm = torch.nn.Identity()
    return built


def checkpoint(built: Any) -> dict[str, torch.Tensor]:
    """Its layers' tensors as a checkpoint names them, the first layer as the second."""
    found = {}
    for name, tensor in built.state_dict().items():
        if not name.startswith("layers."):
            continue
        _, index, rest = name.split(".", 2)
        prefix = f"model.layers.{int(index) + 1}"
        layer, experts, kind = rest.partition("mlp.experts.")
        if not experts:
            found[f"{prefix}.{rest}"] = tensor
            continue
        for number, expert in enumerate(tensor):
            place = f"{prefix}.{layer}mlp.experts.{number}"
            if kind == "gate_up_proj":
                gate, up = expert.chunk(2)
                found |= {f"{place}.gate_proj.weight": gate, f"{place}.up_proj.weight": up}
            else:
                found[f"{place}.down_proj.weight"] = expert
    return found


def shard(built: Any, layers: int, dtype: torch.dtype, device: str) -> Shard:
    """The same layers, ours: those between two others."""
    told = {**built.config.to_dict(), "num_hidden_layers": layers + 2}
    return Shard(
        *(architecture(told), Span(1, layers + 1), layers + 2, checkpoint(built)),
        *(str(dtype).removeprefix("torch."), device),
    )


def error(device: str, layers: int = 2) -> float:
    """Of a prompt and a step of several sessions, float32, against transformers."""
    theirs = model(layers, torch.float32, device)
    ours = shard(theirs, layers, torch.float32, device)
    hidden = theirs.config.hidden_size
    x = torch.randn(SESSIONS, PROMPT + 1, hidden, device=device)
    with torch.inference_mode():
        wanted = theirs(inputs_embeds=x).last_hidden_state
        pool = ours.make_pool(SESSIONS * 4, BLOCK)
        pool.data.fill_(float("nan"))
        named = tables(SESSIONS, PROMPT + 1)
        prompts = [
            Extent(0, PROMPT, named[n][: -(-PROMPT // BLOCK)], BLOCK) for n in range(SESSIONS)
        ]
        first = x[:, :PROMPT].reshape(-1, hidden).clone()
        got = ours.forward(first, ragged(prompts, ours.device), pool)
        steps = [Extent(PROMPT, 1, named[n], BLOCK) for n in range(SESSIONS)]
        last = ours.forward(x[:, PROMPT].clone(), ragged(steps, ours.device), pool)
        both = torch.cat((got.view(SESSIONS, PROMPT, hidden), last[:, None]), 1)
        return float((both - wanted).norm() / wanted.norm())


def floor_s(ours: Shard, pool: KvPool, rows: int, ctx: int, bandwidth: float) -> float:
    a, layers = ours.architecture, len(ours.span)
    experts, chosen = (16, CHOSEN) if a.hidden == 64 else (EXPERTS, CHOSEN)
    part = 1 - (1 - chosen / experts) ** rows
    width = 32 if a.hidden == 64 else WIDTH
    of_experts = layers * experts * 3 * a.hidden * width * ours.dtype.itemsize
    dense = ours.weight_bytes - of_experts
    return (dense + part * of_experts + rows * (ctx + 1) * pool.bytes_per_token) / bandwidth


def measure(given: argparse.Namespace, report: dict[str, Any]) -> None:
    """Error, and times by batch size, into `report` and on the screen."""
    device, bandwidth = given.device, report["read_tb_s"] * 1e12
    report["moe_error"] = error(device)
    say(f"moe: relative error of float32 against transformers {report['moe_error']:.1e}")
    free()
    layers, dtype = given.layers or 4, torch.bfloat16
    theirs = model(layers, dtype, device)
    ours = shard(theirs, layers, dtype, device)
    del theirs
    free()
    pool = ours.make_pool(max(given.batch) * -(-(given.ctx + 1) // BLOCK), BLOCK)
    pool.data.normal_()
    for rows in given.batch:
        extents = [Extent(given.ctx, 1, t, BLOCK) for t in tables(rows, given.ctx + 1)]
        batch = ragged(extents, ours.device)
        x = torch.randn(rows, ours.architecture.hidden, dtype=dtype, device=device)

        def step(x: torch.Tensor = x, batch: Any = batch) -> None:
            ours.forward(x.clone(), batch, pool)
            if device != "cpu":
                torch.cuda.synchronize()

        with torch.inference_mode():
            least = floor_s(ours, pool, rows, given.ctx, bandwidth)
            timed(step, device, 3)
            step_s = clocked(step)
        report["step_ms"].setdefault("moe", {})[str(rows)] = round(step_s * 1e3, 3)
        report["decode_x_floor"].setdefault("moe", {})[str(rows)] = round(step_s / least, 2)
        say(f"moe: {layers} layers, decode batch {rows}: {step_s * 1e3:.3f} ms = "
            f"{step_s / least:.2f} x floor ({least * 1e3:.3f} ms)")  # fmt: skip
    free()
