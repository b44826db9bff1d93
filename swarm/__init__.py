"""hexswarm: large language models on GPUs that volunteers own, found and routed by each client.

    import hexswarm
    print(hexswarm.generate("The capital of France is", bootstrap=["/ip4/.../p2p/..."]))

The names below are the public surface; they are loaded when first used, so that
`import hexswarm` costs milliseconds and neither torch nor hivemind.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hexswarm.version import __version__

if TYPE_CHECKING:
    from hexswarm.blocking import Client, generate
    from hexswarm.client import AsyncClient
    from hexswarm.conversation import Completion
    from hexswarm.errors import (
        AddressInUse,
        BootstrapUnreachable,
        ClockSkew,
        ContextTooLong,
        CorruptWeights,
        HexswarmError,
        LocalProtocolError,
        MemberLost,
        ModelError,
        NetworkError,
        NoRoute,
        OutOfMemory,
        PeerLost,
        ProtocolError,
        Refused,
        RemoteProtocolError,
        SessionClosed,
        UnknownModel,
        UnsupportedModel,
        UsageError,
        WrongPeer,
    )
    from hexswarm.records import Sampling

_HOMES = {
    "generate": "hexswarm.blocking",
    "Client": "hexswarm.blocking",
    "AsyncClient": "hexswarm.client",
    "Completion": "hexswarm.conversation",
    "Sampling": "hexswarm.records",
}

__all__ = [
    "AddressInUse",
    "AsyncClient",
    "BootstrapUnreachable",
    "Client",
    "ClockSkew",
    "Completion",
    "ContextTooLong",
    "CorruptWeights",
    "HexswarmError",
    "LocalProtocolError",
    "MemberLost",
    "ModelError",
    "NetworkError",
    "NoRoute",
    "OutOfMemory",
    "PeerLost",
    "ProtocolError",
    "Refused",
    "RemoteProtocolError",
    "Sampling",
    "SessionClosed",
    "UnknownModel",
    "UnsupportedModel",
    "UsageError",
    "WrongPeer",
    "__version__",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hexswarm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "hexswarm.errors")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
