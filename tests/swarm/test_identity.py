"""Keys, peer ids and signatures; the key file that go-libp2p reads."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm import identity as module
from hexswarm.errors import UsageError
from hexswarm.identity import Identity, peer_id, public_key, verify
from hexswarm.records import PeerId

ONE = Identity(bytes(range(32)))


def test_a_known_key() -> None:
    """The Ed25519 vector of libp2p's peer-ids specification; such ids all begin alike.

    That go-libp2p makes the same id of our key file is seen in `test_dht.py`.
    """
    seed = bytes.fromhex("7e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d")
    key = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert Identity(seed).public == key
    assert Identity(seed).peer == peer_id(key)
    assert peer_id(key).startswith("12D3KooW")
    assert len(peer_id(key)) == 52


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_is_its_key(key: bytes) -> None:
    assert public_key(peer_id(key)) == key


@given(st.binary(max_size=60))
def test_base58_round_trip(data: bytes) -> None:
    assert module._from_base58(module._to_base58(data)) == data


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3KooW",
        "1" * 52,
        "0" * 52,
        "l" * 52,
        "Ω" * 52,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "1" * 4000,
        ONE.peer[:-1],
        ONE.peer + "1",
        "1" + ONE.peer,
    ],
)
def test_what_is_no_ed25519_id_has_no_key(text: str) -> None:
    assert public_key(PeerId(text)) is None
    assert not verify(PeerId(text), b"", bytes(64))


@settings(max_examples=50)
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=100), st.data())
def test_signatures(seed: bytes, message: bytes, data: st.DataObject) -> None:
    """A signature holds for its message and signer, and not with any bit changed."""
    identity = Identity(seed)
    signature = identity.sign(message)
    assert verify(identity.peer, message, signature)
    assert not verify(ONE.peer, message, signature) or seed == ONE.seed
    assert not verify(identity.peer, message + b"x", signature)
    bit = data.draw(st.integers(0, 511))
    flipped = bytearray(signature)
    flipped[bit // 8] ^= 1 << bit % 8
    assert not verify(identity.peer, message, bytes(flipped))


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65), None, 7, "x" * 64])
def test_odd_signatures_do_not_hold(signature: bytes) -> None:
    assert not verify(ONE.peer, b"message", signature)


def test_a_key_file_is_made_once_and_kept_secret(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "peer.key"
    made = Identity.load(path)
    assert Identity.load(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["peer.key"], "no draft is left"


def test_the_file_is_a_libp2p_private_key(tmp_path: Path) -> None:
    """Protobuf field 1 (type) = 1, field 2 = 64 bytes: seed and public key."""
    path = tmp_path / "peer.key"
    identity = Identity.load(path)
    raw = path.read_bytes()
    assert raw[:4] == b"\x08\x01\x12\x40"
    assert raw[4:36] == identity.seed
    Ed25519PublicKey.from_public_bytes(raw[36:]).verify(identity.sign(b"m"), b"m")


@pytest.mark.parametrize("damage", ["short", "long", "type", "public", "empty", "text"])
def test_a_damaged_key_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "peer.key"
    Identity.load(path)
    raw = path.read_bytes()
    path.write_bytes(
        {
            "short": raw[:-1],
            "long": raw + b"\0",
            "type": b"\x08\x00" + raw[2:],
            "public": raw[:-1] + bytes([raw[-1] ^ 1]),
            "empty": b"",
            "text": b"not a key at all",
        }[damage]
    )
    with pytest.raises(UsageError, match="not an Ed25519 identity"):
        Identity.load(path)


def test_paths_that_cannot_hold_a_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        Identity.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot"):
        Identity.load(tmp_path / "file" / "peer.key")


def test_two_processes_that_start_at_once_share_one_key(tmp_path: Path) -> None:
    path = tmp_path / "peer.key"
    program = f"from hexswarm.identity import *; print(Identity.load(Path({str(path)!r})).peer)"
    starts = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd="/")
        for _ in range(3)
    ]
    answers = {start.communicate()[0] for start in starts}
    assert answers == {f"{Identity.load(path).peer}\n".encode()}


def test_an_identity_is_claimed_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "peer.key"
    claimed = Identity.claim(path)
    program = f"from hexswarm.identity import *; Identity.claim(Path({str(path)!r}))"
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False
    )
    assert "in use by another process" in other.stderr
    assert Identity.load(path) == claimed, "reading stays allowed"
    module._claims.clear()
