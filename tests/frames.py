"""Hypothesis strategies for messages and frames: every kind, up to the edges of its fields."""

from __future__ import annotations

from hypothesis import strategies as st

from hexswarm.messages import (
    MAX_LAYERS,
    MAX_TOKENS,
    Cancel,
    Close,
    Failed,
    Generate,
    GoAway,
    GroupAnswer,
    GroupCommit,
    GroupInvite,
    GroupLeave,
    GroupRelease,
    GroupReport,
    Hello,
    Hidden,
    Logits,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Refuse,
    Token,
    Tokens,
    Trace,
    Traced,
)
from hexswarm.records import DTYPES
from hexswarm.wire import Frame


def _upto(limit: int) -> st.SearchStrategy[int]:
    """Any integer, the edges often."""
    return st.integers(0, limit) | st.sampled_from([0, limit])


def _text(limit: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), max_size=limit)


keys = st.binary(min_size=16, max_size=16)
small = _upto(1 << 16)
positions = _upto(MAX_TOKENS)
reals = st.floats(allow_nan=False, allow_infinity=False)
amounts = st.floats(0, allow_nan=False, allow_infinity=False)
nonces = _upto((1 << 63) - 1)
peers = _text(128)
here = {"session": keys, "epoch": small}
turn = {**here, "turn": small}
epochs = _upto(1 << 62)
group = {"group": _text(64), "epoch": epochs}

messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, version=small, software=_text(64), lane=st.integers(0, 1), link=keys),
    st.builds(Ping, nonce=nonces),
    st.builds(Pong, nonce=nonces),
    st.builds(
        Open,
        **here,
        digest=_text(64),
        first=_upto(MAX_LAYERS),
        end=st.integers(1, MAX_LAYERS),
        predecessor=peers,
        successor=peers,
        successor_addresses=st.lists(_text(256), max_size=8).map(tuple),
        kv_tokens=st.integers(1, MAX_TOKENS),
        step_s=amounts,
    ),
    st.builds(Opened, **here, kv_tokens=st.integers(1, MAX_TOKENS)),
    st.builds(Refuse, **here, code=_text(16), reason=_text(256), retry_s=reals),
    st.builds(
        Generate,
        **turn,
        max_new=positions,
        stop_ids=st.lists(_upto(1 << 24), max_size=64).map(tuple),
        temperature=reals,
        top_p=reals,
        top_k=_upto(1 << 20),
        min_p=reals,
        repetition_penalty=reals,
        seed=_upto((1 << 64) - 1),
    ),
    st.builds(Tokens, **turn, position=positions, last=st.booleans(), siblings=small),
    st.builds(
        Hidden,
        **turn,
        position=positions,
        count=st.integers(1, 1 << 20),
        last=st.booleans(),
        dtype=st.sampled_from(sorted(DTYPES)),
        siblings=small,
    ),
    st.builds(
        Token,
        **turn,
        position=positions,
        token=_upto(1 << 24),
        finish=st.sampled_from(["", "stop", "length"]),
    ),
    st.builds(Logits, **turn, position=positions),
    st.builds(Cancel, **turn),
    st.builds(Close, session=keys),
    st.builds(Failed, **here, code=_text(16), reason=_text(256), peer=peers),
    st.builds(GoAway, exit_s=reals),
    st.builds(Trace, **here, nonce=nonces),
    st.builds(
        Traced,
        **here,
        steps=positions,
        wait_s=amounts,
        compute_s=amounts,
        handle_s=amounts,
        prompt_wait_s=amounts,
        prompt_compute_s=amounts,
        rows=amounts,
        successor_rtt_s=reals,
        nonce=nonces,
    ),
    st.builds(GroupInvite, **group),
    st.builds(GroupAnswer, **group, code=_text(16), reason=_text(256), latest=epochs),
    st.builds(GroupCommit, **group),
    st.builds(GroupReport, **group),
    st.builds(GroupRelease, **group),
    st.builds(GroupLeave, **group, how=_text(256)),
)

frames = st.builds(Frame, messages, st.binary(max_size=64))
