"""Folders that we make ourselves: built beside their place, renamed into it, once per machine.

`make_once` is the whole protocol. Five peers that start together on one machine meet at a lock
file; the first one builds into a temporary folder and renames it, the others wait and find it. A
lock taken with flock ends with its holder, so a killed process leaves a temporary folder at most,
which the next one removes. `config_files` writes what transformers and we need beside weights.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hexswarm.errors import CorruptWeights, UnsupportedModel
from hexswarm.gguf import GgufFile
from hexswarm.gguf_config import gguf_config
from hexswarm.manifest import write_json
from hexswarm.progress import Progress


def make_once(
    folder: Path, build: Callable[[Path], None], whole: Callable[[Path], bool], progress: Progress
) -> bool:
    """Let `build` fill `folder` unless it is `whole`; True if this call built it."""
    if whole(folder):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder, progress):
        if whole(folder):
            return False
        for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        draft = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
        draft.mkdir()
        try:
            build(draft)
            if folder.exists():
                shutil.rmtree(folder)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return True


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of `folder` among all processes and threads of this machine."""
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"waiting for another process that prepares {folder.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def config_files(file: GgufFile, folder: Path) -> None:
    """Write config, generation config and tokenizer of a GGUF in Hugging Face's formats."""
    config = gguf_config(file)
    write_json(folder / "config.json", config)
    tokens = {key: config[key] for key in config if key.endswith("_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
    _tokenizer_files(file, folder, config["max_position_embeddings"])


def _tokenizer_files(file: GgufFile, folder: Path, context: int) -> None:
    """Convert the vocabulary with transformers, into settings that versions 4 and 5 read alike.

    transformers does not know llama.cpp's pre-tokenizer "smollm" (each digit on its own, then
    GPT-2's pattern), so that one is put in here.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.path.parent),
            gguf_file=file.path.name,
            local_files_only=True,
            trust_remote_code=False,
        )
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if not file.metadata.get("tokenizer.ggml.tokens"):
            raise CorruptWeights(f"{file.path} contains no vocabulary") from error
        raise UnsupportedModel(
            f"the tokenizer of {file.path.name} cannot be converted ({error})",
            remedy="use the model's safetensors from the Hub",
        ) from error
    if file.metadata.get("tokenizer.ggml.pre") == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        backend["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [digits, backend["pre_tokenizer"]],
        }
    write_json(folder / "tokenizer.json", backend)
    write_json(folder / "tokenizer_config.json", _tokenizer_config(file, tokenizer, context))


def _tokenizer_config(file: GgufFile, tokenizer: Any, context: int) -> dict[str, Any]:
    words = file.metadata["tokenizer.ggml.tokens"]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": file.metadata.get("tokenizer.chat_template"),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = file.metadata.get(f"tokenizer.ggml.{ours}_token_id")
        if type(number) is int and number < len(words):
            settings[f"{theirs}_token"] = words[number]
    for name in ("add_bos_token", "add_eos_token"):
        if (value := getattr(tokenizer, name, None)) is not None:
            settings[name] = bool(value)
    return {key: value for key, value in settings.items() if value is not None}
