"""From a config to something that can run: device, span, weights, KV pool and measured speed.

Where the weights lie, on one device or cut over several, is the host's matter
(`hexswarm.peer.hosting`); what is served is closed by closing its host.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from hexswarm.config import PeerConfig
from hexswarm.errors import OutOfMemory, UsageError
from hexswarm.peer.cache import BLOCK_TOKENS
from hexswarm.peer.fitting import held_bytes
from hexswarm.peer.hosting import Host, Hosting
from hexswarm.peer.packing import kept_of
from hexswarm.peer.probe import BLOCKS, Measured, cached, measure, rehearse, try_threads
from hexswarm.peer.runner import Runner
from hexswarm.peer.threads import fewest_threads
from hexswarm.progress import Progress
from hexswarm.records import Span
from hexswarm.store import ModelFolder
from hexswarm.version import __version__


@dataclass(frozen=True, slots=True)
class Served:
    """What was loaded, ready to run."""

    folder: ModelFolder
    span: Span
    runner: Runner
    blocks: int
    dtype: str
    device: str
    measured: Measured
    host: Host
    quant: str = "none"

    @property
    def numerics(self) -> str:
        """With which numbers the layers compute: answers are alike among peers that say the same.

        "bfloat16" for weights as they are, "bfloat16+int8" for rounded ones.
        """
        return self.dtype if self.quant == "none" else f"{self.dtype}+{self.quant}"


def choose_device(config: PeerConfig) -> tuple[str, str]:
    """Device and dtype for `auto`: the first CUDA device in bfloat16, else the CPU in float32."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"no CUDA device for {device!r}", remedy="use --device cpu")
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}", remedy="use cpu, cuda or cuda:N") from error
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "bfloat16"
    return device, dtype


def check_span(span: Span, layers: int) -> Span:
    """`span` if the model has it. Raises UsageError."""
    if span.end > layers:
        raise UsageError(
            f"span {span} reaches beyond the model's {layers} layers",
            remedy=f"give a span inside 0:{layers}",
        )
    return span


def load(
    config: PeerConfig,
    folder: ModelFolder,
    span: Span,
    device: str,
    dtype: str,
    progress: Progress,
    hosting: Hosting,
) -> Served:
    """Weights, KV pool and measured speed of one span. Raises OutOfMemory, CorruptWeights, or
    what kept the host from starting."""
    host = hosting.start(folder, span, device, dtype, progress)
    try:
        served = _prepare(config, folder, span, device, dtype, progress, host)
    except BaseException:
        host.close()
        raise
    host.guard()
    return served


def _prepare(
    config: PeerConfig,
    folder: ModelFolder,
    span: Span,
    device: str,
    dtype: str,
    progress: Progress,
    host: Host,
) -> Served:
    shard = host.shard
    if said := tell_packed(folder, span, dtype, config.quant, shard.backend, cut=bool(host.title)):
        progress.note(said)
    blocks = -(-config.kv_tokens // BLOCK_TOKENS)
    try:
        pool = shard.make_pool(max(blocks, BLOCKS))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise OutOfMemory(
            f"KV for {config.kv_tokens} tokens does not fit {device}",
            remedy="lower --kv-tokens",
        ) from error
    if shard.backend == "triton":
        progress.note(f"compiling for layers {span} on {device}")
        shard.warm(pool)
    runner = Runner(shard, pool)
    shape = (span, folder.spec.layers, folder.spec.hidden, dtype)
    if shard.backend == "triton":
        rehearse(runner.run, *shape)
    if shard.backend == "native" and not config.threads:

        def resize(count: int) -> None:
            shard.threads = count

        most = torch.get_num_threads()
        shard.threads = fewest_threads(try_threads(runner.run, resize, *shape), most)
    parts = (
        *(folder.spec.digest, span, dtype, config.quant, device, shard.backend),
        *(torch.get_num_threads(), shard.threads, *filter(None, [host.title])),
        *(__version__, torch.__version__, platform.processor(), platform.node()),
    )
    progress.note(f"measuring the speed of layers {span} on {device}")
    measured = cached(
        config.cache / "speed.json",
        parts,
        lambda: measure(runner.run, *shape),
    )
    return Served(folder, span, runner, blocks, dtype, device, measured, host, config.quant)


def tell_packed(
    folder: ModelFolder, span: Span, dtype: str, quant: str, backend: str, *, cut: bool = False
) -> str:
    """What becomes of a file's 4 bits, or could; nothing if it has none or they do not matter.

    Only Triton keeps few bits, so elsewhere they are no saving to speak of. `cut`: by a group.
    """
    held, matrices = kept_of(folder, span)
    if not held:
        return ""
    stored = f"{held} of the {matrices} matrices of layers {span}"
    if quant == "int4":
        how = "are kept" if backend == "triton" else "have their numbers"
        where = ", where the cut leaves blocks whole" if cut else ""
        return f"{stored} {how} as the file has them, in 4 bits (Q4_0){where}"
    if quant != "none" or backend != "triton":
        return ""
    wide, few = (held_bytes(folder, span, dtype, bits) / 1e9 for bits in (16, 4))
    return (
        f"{stored} have 4 bits in the file and are widened: {wide:.1f} GB instead of the "
        f"{few:.1f} GB of --quant int4, for requests that ask for {dtype}+int4"
    )
