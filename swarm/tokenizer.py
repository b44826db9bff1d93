"""Text to token ids and back, the latter one token at a time.

transformers knows every tokenizer's files and quirks, so it is used, with local files only and
never with code from a model's folder. Chat templates are programs by strangers too. They come from
the model's folder alone, never from a request, and are rendered in Jinja's immutable sandbox in a
process of their own (`hexswarm.templates`), within 2 s and 1 MiB; a template that tries to reach
Python's internals, that fails or that takes more, is a `UsageError`.

`TextStream` is the hard part. A token is not a piece of text: it may be a third of an emoji, and
with SentencePiece its leading space depends on what precedes it. So text is never decoded token by
token but as a difference: decode(window + new) - decode(window), where the window is the last
piece that was emitted, and nothing is emitted while the difference ends in U+FFFD, the mark of an
unfinished character. The window keeps the cost of a token constant. Rejected: a byte-level decoder
of our own (faster, wrong for the next family).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hexswarm.errors import CorruptWeights, UnknownModel, UsageError
from hexswarm.manifest import read_json
from hexswarm.templates import Templates

if TYPE_CHECKING:
    from hexswarm.store import ModelFolder

Message = Mapping[str, str]
"""One turn of a chat: `role` and `content`."""

_UNFINISHED = "\ufffd"


class Tokenizer:
    """A model's tokenizer; `stop_ids` are the tokens that end an answer."""

    def __init__(self, backend: Any, stop_ids: frozenset[int]) -> None:
        self._backend = backend
        self._templates = Templates()
        self.stop_ids = stop_ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the model's own prefix (BOS) if it has one."""
        try:
            ids = [int(token) for token in self._backend(text)["input_ids"]]
        except (TypeError, ValueError) as error:
            raise UsageError("the prompt is not valid text", remedy="give UTF-8") from error
        if not ids:
            raise UsageError("the prompt is empty")
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to where the assistant's answer begins."""
        turns = check_messages(messages)
        if not getattr(self._backend, "chat_template", None):
            raise UsageError(
                "this model has no chat template", remedy="use a plain prompt instead of a chat"
            )
        try:
            text = self._templates.render(
                self._backend.get_chat_template(),
                {
                    **{name: str(value) for name, value in self._special().items()},
                    "messages": turns,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": True,
                },
            )
            ids = self._backend(text, add_special_tokens=False)["input_ids"]
        except (UsageError, TypeError, ValueError) as error:
            raise UsageError(
                f"the model's chat template rejects these messages ({error})",
                remedy="begin with at most one system message, then alternate user and assistant",
            ) from error
        if not ids:
            raise UsageError("the chat is empty")
        return [int(token) for token in ids]

    def _special(self) -> Mapping[str, Any]:
        """Texts of the special tokens by name; templates print some of them."""
        found: Mapping[str, Any] = self._backend.special_tokens_map
        return {name: value for name, value in found.items() if not isinstance(value, list)}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        return str(
            self._backend.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def load_tokenizer(folder: ModelFolder | Path) -> Tokenizer:
    """The tokenizer whose files lie in `folder`; raises a ModelError."""
    path = folder if isinstance(folder, Path) else folder.path
    if not path.is_dir():
        raise UnknownModel(f"there is no folder {path}")
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the Rust tokenizers raise plain Exception for a damaged file
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorruptWeights(
            f"the tokenizer in {path} cannot be loaded ({said[:200]})",
            remedy="fetch tokenizer.json and tokenizer_config.json again",
        ) from error
    return Tokenizer(backend, _stop_ids(path, backend))


def _stop_ids(path: Path, backend: Any) -> frozenset[int]:
    """All end-of-text ids that the model's files name."""
    found: list[Any] = [backend.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            content = read_json(path / name)
            named = content.get("eos_token_id") if isinstance(content, dict) else None
            found.extend(named if isinstance(named, list) else [named])
    return frozenset(token for token in found if type(token) is int and token >= 0)


def check_messages(messages: Any) -> list[dict[str, str]]:
    """`messages` as plain dicts; raises UsageError if they are not a chat."""
    shape = UsageError(
        "messages are not a non-empty list of {role, content} with text in both",
        remedy='for example [{"role": "user", "content": "Hello"}]',
    )
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise shape
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise shape
        role, content = message["role"], message["content"]
        if not (isinstance(role, str) and role and isinstance(content, str)):
            raise shape
        turns.append({"role": role, "content": content})
    return turns


class TextStream:
    """Turns tokens into text as they come.

    `push` returns the text that has become certain, `finish` the rest; together they are
    `decode(ids)`, cut before the first stop string. `after` are the last tokens of the prompt: with
    them a SentencePiece model's first word keeps the space that separates it from the prompt.
    Text that may turn out to begin a stop string is held back. A chat leaves `after` empty.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()
    ) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise UsageError("stop strings are a list of non-empty texts")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._window = list(after[-8:])
        self._pending: list[int] = []
        self._base = tokenizer.decode(self._window) if self._window else ""
        self._held = ""
        self.stopped = False
        """Whether a stop string occurred; what is pushed later is ignored."""

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come."""
        if self.stopped:
            return ""
        self._pending.append(token)
        fresh = self._fresh()
        if not fresh or fresh.endswith(_UNFINISHED):
            return ""
        self._advance()
        return self._release(fresh, last=False)

    def finish(self) -> str:
        """What is left, half characters as U+FFFD."""
        if self.stopped:
            return ""
        fresh = self._fresh() if self._pending else ""
        self._advance()
        return self._release(fresh, last=True)

    def _fresh(self) -> str:
        """The pending tokens' text, as it reads behind the window."""
        together = self._tokenizer.decode(self._window + self._pending)
        if together.startswith(self._base):
            return together[len(self._base) :]
        return self._tokenizer.decode(self._pending)

    def _advance(self) -> None:
        self._window, self._pending = self._pending, []
        self._base = self._tokenizer.decode(self._window) if self._window else ""

    def _release(self, fresh: str, *, last: bool) -> str:
        """Add `fresh` to the held text; return what cannot belong to a stop string any more.

        Of several stop strings the one that is complete first counts, so that the result does not
        depend on how the text was cut into tokens.
        """
        text = self._held + fresh
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = 0 if last else _overlap(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
