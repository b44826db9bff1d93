"""The tokenizer: chats, stop tokens, and text that comes one token at a time."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from hexswarm.config import DEFAULT_MODEL
from hexswarm.config import cache as default_home
from hexswarm.errors import CorruptWeights, UnknownModel, UsageError
from hexswarm.store import resolve
from hexswarm.templates import RENDER_S, START_S, Templates
from hexswarm.tokenizer import TextStream, Tokenizer, load_tokenizer
from tests import tiny

HELLO = [{"role": "user", "content": "hi"}]
SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", "</s>", *BYTES, SPACE, f"{SPACE}Paris", f"{SPACE}is", "is", "P", "a", "."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return load_tokenizer(resolve(DEFAULT_MODEL, home=default_home()))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A tokenizer in Llama 2's manner: the first space is cut off, unknown bytes are spelled."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset({1}))


def stream(tokenizer: Tokenizer, ids: list[int], **options: Any) -> list[str]:
    """What a TextStream says at each token and at the end."""
    text = TextStream(tokenizer, **options)
    return [*(text.push(token) for token in ids), text.finish()]


# ---------------------------------------------------------------------------- prompts and chats


def test_prompts_and_decoding(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_prompt("that a<end>")
    assert ids[0] == tiny.WORDS.index("th")
    assert tokenizer.decode(ids) == "that a"
    with pytest.raises(UsageError, match="empty"):
        tokenizer.encode_prompt("")
    with pytest.raises(UsageError, match="not valid text"):
        tokenizer.encode_prompt("\ud800")


def test_a_chat_ends_where_the_answer_begins(folder: Path, default: Tokenizer) -> None:
    tokenizer = load_tokenizer(folder)
    text = "<start>user hi<end><start>assistant "
    assert tokenizer.encode_chat(HELLO) == tokenizer.encode_prompt(text)
    assert default.decode(default.encode_chat(HELLO)).endswith("user\nhi\nassistant\n")


@pytest.mark.parametrize(
    "messages",
    [None, [], "hi", {}, HELLO[0], ["hi"], [{"role": "user"}], [{"role": "", "content": "x"}],
     [{"role": "user", "content": None}], [{"role": 1, "content": "x"}],
     [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
     [{"role": "user", "content": "x", "tool": "y"}]],
)  # fmt: skip
def test_what_is_no_chat(folder: Path, messages: Any) -> None:
    with pytest.raises(UsageError, match="role, content"):
        load_tokenizer(folder).encode_chat(messages)


def test_a_missing_template_has_a_remedy(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path, template=None)
    with pytest.raises(UsageError, match="plain prompt"):
        load_tokenizer(tmp_path).encode_chat(HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for x in %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
        "{% set _ = messages.append(1) %}",
        "{{ ('%s' % messages).format.__self__.__class__.__base__.__subclasses__() }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "",
        "{% set n = namespace(x=messages) %}{% set n.__class__ = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ strftime_now.__globals__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}",
        "{{ 'x' * 2000000000 }}",
        "{{ '%2000000000d' % 1 }}",
    ],
)
def test_templates_that_fail_or_break_out_are_usage_errors(tmp_path: Path, template: str) -> None:
    tiny.save_tokenizer(tmp_path, template)
    with pytest.raises(UsageError):
        load_tokenizer(tmp_path).encode_chat(HELLO)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "longer than",
        ),
        (
            "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}{{ n.x }}",
            "MiB|ended|Memory|longer than",  # a busy machine may need 2 s for so much memory
        ),
        ("{{ 'x' * 1048577 }}", "characters"),
    ],
    ids=["time", "memory", "text"],
)
def test_a_template_is_held_to_time_and_memory(tmp_path: Path, template: str, why: str) -> None:
    """And the next chat is rendered as if nothing had been."""
    tiny.save_tokenizer(tmp_path, template)
    hostile = load_tokenizer(tmp_path)
    begun = time.monotonic()
    with pytest.raises(UsageError, match=why):
        hostile.encode_chat(HELLO)
    assert time.monotonic() - begun < RENDER_S + START_S
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert usage < 4 << 20, "kibibytes: not in this process"
    assert hostile._templates.render("{{ 1 + 1 }}", {}) == "2"


TEMPLATES = [
    tiny.TEMPLATE,
    "{%- if messages[0]['role'] == 'system' %}S{% endif %}\n  {%- for m in messages %}\n"
    "{{ '<|' + m.role + '|>' + m['content'] | trim }}\n{% if loop.last %}{% break %}{% endif %}"
    "{%- endfor %}{{ eos_token }}{% if tools %}T{% endif %}",
    "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ strftime_now('%Y')[:2] }}{{ documents is none }}{{ dict(a=1).a }}",
    "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto',"
    " 'user') | list | length }}{{ bos_token is defined }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_we_render_as_transformers_does(tmp_path: Path, template: str) -> None:
    tiny.save_tokenizer(tmp_path, template)
    ours = load_tokenizer(tmp_path)
    for chat in (HELLO, [{"role": "system", "content": " a\n"}, *HELLO, *HELLO]):
        theirs = ours._backend.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ours.encode_chat(chat) == theirs


def test_the_defaults_chat_is_rendered_as_transformers_does(default: Tokenizer) -> None:
    chat = [{"role": "system", "content": "Be brief."}, *HELLO]
    theirs = default._backend.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert default.encode_chat(chat) == theirs


def test_the_renderer_ends_with_its_owner() -> None:
    templates = Templates()
    assert templates.render("{{ 'ok' }}", {}) == "ok"
    process = templates._process
    assert process is not None
    assert Path(f"/proc/{process.pid}/environ").read_bytes().count(b"\0") <= 2
    process.kill()
    process.wait()
    assert templates.render("{{ 'again' }}", {}) == "again", "a dead one is replaced"
    process = templates._process
    del templates
    assert process is not None
    assert process.poll() is not None


# ---------------------------------------------------------------------------- loading


def test_all_stop_tokens_are_found(folder: Path) -> None:
    assert load_tokenizer(folder).stop_ids == {0}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert load_tokenizer(folder).stop_ids == {0, 5, 7}


def test_the_default_stops_at_the_end_of_a_turn(default: Tokenizer) -> None:
    assert default.stop_ids == {2}


def test_no_folder_and_a_damaged_tokenizer(folder: Path) -> None:
    with pytest.raises(UnknownModel):
        load_tokenizer(folder / "nothing")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    with pytest.raises(CorruptWeights, match="tokenizer"):
        load_tokenizer(folder)


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    settings["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # transformers refuses, or takes tokenizer.json alone: either is well
    with contextlib.suppress(CorruptWeights):
        load_tokenizer(folder)


# ---------------------------------------------------------------------------- text as it comes


def test_half_a_character_is_never_emitted(default: Tokenizer) -> None:
    ids = default.encode_prompt("né 🎉🏳️‍🌈 好的!")
    pieces = stream(default, ids)
    assert "".join(pieces) == "né 🎉🏳️‍🌈 好的!"
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces[:-1]
    assert pieces[-1] == ""


def test_an_answer_that_ends_in_half_a_character(default: Tokenizer) -> None:
    ids = default.encode_prompt("ok 🎉")[:-1]
    pieces = stream(default, ids)
    assert "".join(pieces) == default.decode(ids)
    assert pieces[-1].endswith("\ufffd")


def test_special_tokens_are_silent(default: Tokenizer) -> None:
    ids = default.encode_prompt("<|im_start|>a b<|im_end|> c")
    assert "".join(stream(default, ids)) == "a b c"


def test_sentencepiece_keeps_the_spaces_between_words(sentencepiece: Tokenizer) -> None:
    paris, is_, dot = (PIECES.index(x) for x in (f"{SPACE}Paris", f"{SPACE}is", "."))
    assert stream(sentencepiece, [paris, is_, dot]) == ["Paris", " is", ".", ""]
    assert stream(sentencepiece, [is_, dot], after=[paris]) == [" is", ".", ""]


def test_sentencepiece_spells_bytes(sentencepiece: Tokenizer) -> None:
    party = [PIECES.index(f"<0x{byte:02X}>") for byte in "🎉".encode()]
    paris = PIECES.index(f"{SPACE}Paris")
    assert stream(sentencepiece, [paris, *party, *party, paris]) == [
        "Paris", "", "", "", "🎉", "", "", "", "🎉", " Paris", "",
    ]  # fmt: skip


@given(st.text(max_size=40))
def test_streamed_text_is_the_decoded_text(default: Tokenizer, text: str) -> None:
    """Any text, token by token, comes out as when decoded at once, in whole characters.

    (The default's vocabulary lacks some bytes, hence a few characters cannot pass through it.)
    """
    ids = default._backend(text)["input_ids"]
    pieces = stream(default, ids)
    assert "".join(pieces) == default.decode(ids)
    if default.decode(ids) == text and "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, 49151), max_size=30))
def test_any_tokens_are_streamed_as_they_decode(default: Tokenizer, ids: list[int]) -> None:
    """Even tokens that form no valid UTF-8 give the same text streamed as at once."""
    assert "".join(stream(default, ids)) == default.decode(ids)


# ---------------------------------------------------------------------------- stop strings


def test_a_stop_string_ends_the_text(default: Tokenizer) -> None:
    text = TextStream(default, stop=("\n\n", "END"))
    ids = default.encode_prompt("one\ntwo\n\nthree")
    said = "".join(text.push(token) for token in ids)
    assert (said, text.stopped) == ("one\ntwo", True)
    assert (text.push(ids[0]), text.finish()) == ("", "")


def test_what_may_begin_a_stop_string_is_held_back(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = TextStream(tokenizer, stop=("xyz",))
    ids = tokenizer.encode_prompt("axyxy")
    assert [text.push(token) for token in ids] == ["a", "", "", "xy", ""]
    assert (text.finish(), text.stopped) == ("xy", False)


@pytest.mark.parametrize("stop", ["abc", [""], [1]])
def test_stop_strings_are_a_list_of_texts(default: Tokenizer, stop: Any) -> None:
    with pytest.raises(UsageError):
        TextStream(default, stop=stop)


class Letters(Tokenizer):
    """Token n is the n-th entry of a list of texts: any cutting of a text into tokens."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def decode(self, ids: Any) -> str:
        return "".join(self.texts[token] for token in ids)


@given(
    st.lists(st.text("ab", max_size=4), max_size=10),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stopping_does_not_depend_on_the_tokens(texts: list[str], stop: list[str]) -> None:
    """However a text is cut into tokens, the same is said: all before the first complete stop."""
    whole = "".join(texts)
    ends = [(at + len(s), at) for s in stop if (at := whole.find(s)) >= 0]
    text = TextStream(Letters(texts), stop=stop)
    said = "".join([*(text.push(token) for token in range(len(texts))), text.finish()])
    shortest = {at for end, at in ends if end == min(ends)[0]}
    assert text.stopped == bool(ends)
    assert said == (whole[: min(shortest)] if ends else whole)
