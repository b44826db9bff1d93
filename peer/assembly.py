"""What serves the layers that were loaded: scheduler, leases, engine, stage table, put together."""

from __future__ import annotations

from hexswarm.config import PeerConfig
from hexswarm.peer.admission import Hosted
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.engine import Deliver, Engine
from hexswarm.peer.journal import DEFAULT_BYTES, FREE_SHARE, Journal
from hexswarm.peer.life import Life
from hexswarm.peer.memory import free_bytes
from hexswarm.peer.pace import Pace
from hexswarm.peer.scheduler import Policy, Scheduler
from hexswarm.peer.server import PeerServer
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steptime import StepTime
from hexswarm.records import DTYPES


def assemble(life: Life, deliver: Deliver) -> tuple[Engine, PeerServer]:
    """An engine that runs, in this event loop, and its server, for `life.served`."""
    config, served = life.config, life.served
    spec = served.folder.spec
    hosted = Hosted(life.peer, spec.digest, served.span, spec.layers, spec.hidden)
    policy = Policy.of(
        spec.hidden * DTYPES[served.dtype],
        head=served.span.first == 0,
        efficient_tokens=served.measured.efficient_tokens,
        stages=-(-spec.layers // len(served.span)),
        accelerator=served.device != "cpu",
    )
    tables = BlockTables(served.blocks, lease_s=config.lease_s, keep=config.prefix_cache)
    speed = served.measured.speed
    engine = Engine(
        served.runner,
        Scheduler(policy, tables.blocks, times=StepTime.probed(speed, len(served.span))),
        tables,
        clock=life.clock,
        deliver=deliver,
        pace=Pace(speed, served.span, spec.layers),
        forget=served.runner.forget,
    )
    table = StageTable(hosted, engine, Journal(journal_bytes(config)))
    server = PeerServer(table, engine, life.member.links, life.clock)
    engine.start()
    return engine, server


def journal_bytes(config: PeerConfig) -> int:
    """For what was sent on, kept to replace a lost stage."""
    if config.journal is not None:
        return config.journal
    return min(DEFAULT_BYTES, free_bytes("cpu") // FREE_SHARE)
