"""TLS 1.3 pinned to peer ids: certificates without authorities, names or dates.

A peer id is an Ed25519 key (`hexswarm.identity`), and a direct stream is to be open if and only if
both ends hold the keys of the ids that they claim. Two things are made for that:

- the *leaf*, which a peer shows: its own key, signed by that same key, issued in the name of its
  peer id;
- the *anchor*, which the other end makes for itself out of nothing but the expected peer id: a
  certificate authority of that name and key.

OpenSSL then does what it always does: the leaf is good only if its issuer is a known authority,
whose key signed it. The single authority that a context knows is the expected peer, so whoever else
answers is turned away inside the handshake, on both sides, before a byte is read. `shown` looks at
the key once more afterwards. An anchor bears somebody else's signature, since its maker lacks the
key; OpenSSL trusts what is in its store and never checks the signatures of anchors.

Validity never ends: volunteers' clocks are wrong, and an identity is replaced, not renewed.

Rejected: no verification in OpenSSL and comparing keys afterwards. On the accepting side Python
cannot ask for a certificate without verifying it, so only one end would be known. A signed
challenge inside of one-sided TLS would mend that, at the price of a protocol of our own.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
import tempfile
from collections.abc import Iterator

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from hexswarm.identity import Identity, peer_id

_BEGIN = datetime.datetime(1970, 1, 1)
_NEVER = datetime.datetime(9999, 12, 31, 23, 59, 59)
"""What RFC 5280 (4.1.2.5) writes for "no end"."""
_LEAF = "hexswarm"
"""Subject of every leaf: it must differ from the issuer, or OpenSSL looks for the very leaf in its
store instead of for the one who signed it."""


def context(identity: Identity, expected: bytes, *, server: bool) -> ssl.SSLContext:
    """One end's settings for a stream to the holder of the public key `expected`, once."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = made.maximum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(cadata=_anchor(expected))
    with _as_file(_leaf(identity)) as path:
        made.load_cert_chain(path)
    if server:
        made.num_tickets = 0  # nothing is resumed, and they would come in between our frames
    return made


def shown(tls: ssl.SSLSocket) -> bytes | None:
    """The Ed25519 key of the certificate that the other end has proved to hold."""
    found = tls.getpeercert(binary_form=True)
    if found is None:
        return None
    key = x509.load_der_x509_certificate(found).public_key()
    if not isinstance(key, Ed25519PublicKey):
        return None
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: str, issuer: str, key: Ed25519PublicKey, signer: Ed25519PrivateKey, *, authority: bool
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_NEVER)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    return builder.sign(signer, None)


def _leaf(identity: Identity) -> bytes:
    """Private key and certificate, as PEM."""
    key = Ed25519PrivateKey.from_private_bytes(identity.seed)
    made = _certificate(_LEAF, identity.peer, key.public_key(), key, authority=False)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret + made.public_bytes(Encoding.PEM)


def _anchor(public: bytes) -> bytes:
    """The authority that is this key, as DER."""
    name, key = peer_id(public), Ed25519PublicKey.from_public_bytes(public)
    made = _certificate(name, name, key, Ed25519PrivateKey.generate(), authority=True)
    return made.public_bytes(Encoding.DER)


@contextlib.contextmanager
def _as_file(secret: bytes) -> Iterator[str]:
    """A path that holds `secret` for a moment: Python's ssl reads keys from files alone.

    In memory where the system can; elsewhere a file of mode 0600 in the temporary folder.
    """
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("identity", os.MFD_CLOEXEC)
        with os.fdopen(handle, "wb") as file:
            file.write(secret)
            file.flush()
            yield f"/proc/self/fd/{handle}"
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(secret)
            named.flush()
            yield named.name
