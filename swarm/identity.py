"""Who a peer is: an Ed25519 key pair, the libp2p peer id made of it, signatures.

A libp2p id of an Ed25519 key is an identity multihash: the bytes 00 24 08 01 12 20 followed by the
32-byte public key, in base58. So a peer id *is* the key, and a signature can be checked against a
peer id alone, without any look-up (libp2p peer-ids specification). The key file is what go-libp2p
reads: a protobuf `PrivateKey{type=Ed25519, data=seed+public}`, which for this one key type is a
fixed 4-byte prefix and 64 bytes, so no protobuf library is needed (importing hivemind's would
drag in torch).

hivemind itself generates RSA-2048 keys; rejected because their ids do not carry the key and their
signatures cost four times the bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hexswarm.errors import UsageError
from hexswarm.records import PeerId

_ID_PREFIX = bytes.fromhex("002408011220")
_FILE_PREFIX = bytes.fromhex("08011240")
_claims: list[int] = []
"""Open files whose locks last as long as the process."""
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def _to_base58(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _ALPHABET[digit] + digits
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + digits


def _from_base58(text: str) -> bytes:
    number = 0
    for character in text:
        number = number * 58 + _ALPHABET.index(character)
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")


def peer_id(public_key: bytes) -> PeerId:
    """The libp2p id of a 32-byte Ed25519 public key."""
    return PeerId(_to_base58(_ID_PREFIX + public_key))


def public_key(peer: PeerId) -> bytes | None:
    """The 32-byte key inside a peer id; None if it is not an Ed25519 id."""
    if not 40 <= len(peer) <= 64 or any(character not in _ALPHABET for character in peer):
        return None
    raw = _from_base58(peer)
    if len(raw) != len(_ID_PREFIX) + 32 or not raw.startswith(_ID_PREFIX):
        return None
    return raw[len(_ID_PREFIX) :]


def verify(peer: PeerId, message: bytes, signature: bytes) -> bool:
    """True if `signature` over `message` was made with the key of `peer`."""
    key = public_key(peer)
    if key is None or not isinstance(signature, bytes) or len(signature) != 64:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Identity:
    """A key pair; `seed` is the secret."""

    seed: bytes

    @classmethod
    def generate(cls) -> Identity:
        return cls(os.urandom(32))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read the key file, or make it (mode 0600) when missing.

        Raises UsageError if the file is not an Ed25519 key.
        """
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return cls._create(path)
        except OSError as error:
            raise UsageError(f"cannot read the identity {path}: {error.strerror}") from error
        seed, stored = raw[4:36], raw[36:]
        if len(raw) != 68 or not raw.startswith(_FILE_PREFIX) or cls(seed).public != stored:
            raise UsageError(
                f"{path} is not an Ed25519 identity", remedy="name another file or remove it"
            )
        return cls(seed)

    @classmethod
    def _create(cls, path: Path) -> Identity:
        identity = cls.generate()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(_FILE_PREFIX + identity.seed + identity.public)
            try:
                os.link(draft, path)  # fails if another process was first: then theirs counts
            except FileExistsError:
                return cls.load(path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    draft.unlink()
        except OSError as error:
            raise UsageError(f"cannot write the identity {path}: {error.strerror}") from error
        return identity

    @classmethod
    def claim(cls, path: Path) -> Identity:
        """`load`, and hold the file for this process alone until it ends.

        Raises UsageError if another process uses the identity: two nodes of one name would take
        each other's streams.
        """
        identity = cls.load(path)
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise UsageError(
                f"the identity {path} is in use by another process",
                remedy="give each node its own with --identity FILE",
            ) from error
        _claims.append(handle)
        return identity

    @property
    def public(self) -> bytes:
        key = Ed25519PrivateKey.from_private_bytes(self.seed).public_key()
        return key.public_bytes(Encoding.Raw, PublicFormat.Raw)

    @property
    def peer(self) -> PeerId:
        return peer_id(self.public)

    def sign(self, message: bytes) -> bytes:
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(message)
