"""Noticing that a running turn goes wrong, from what its client can hear; pure.

Three things may be heard: tokens, signs of life on the link to each stage, and the stages' own
words on how far they are (`Progress`). Each catches what the others cannot:

- *silence*: while a turn runs, every stage whose link is quiet is pinged each `PING_S`. One that
  stays quiet for `SILENCE_S`, over three pings, while others are heard and the token is overdue, is
  left at once: a frozen process, a machine without power, a cut way. If *nobody* is heard the
  likelier culprit is our own network, so that waits for `ALONE_S`.
- *deadline*: no token for `max(DEADLINE_S, 10 x mean step)`, although all are alive. All stages
  were asked before, and are asked again; as long as anything moved between two answers the ring is
  slow, not stuck. If nothing moved, fault is read along the ring (`culprit`): the first stage that
  has input but no output hangs, unless it computes for others (that bears waiting for `BUSY_S`); a
  stage that lacks what the one before it sent is cut off from it. The latter is not a matter of how
  busy anybody is, so the questions begin as soon as the token should have come, and a lost frame is
  found long before the deadline. Where the answers tell of work they are asked for less and less
  often: a crowd of sessions that wait is no time for many questions.
- *pace*: the median of the last eight steps is `SLOWER` times the best of this turn, or what was
  predicted. The stage that takes far longer than it announced is named; whether leaving it pays is
  for the planner to say.

No false alarm on a busy machine matters as much as speed. `Pulse` therefore counts silence
only while we listened ourselves (a loop that was held up for 3 s has heard nobody, and that is
nobody's fault), asks for three pings, and takes longer where answers were late before: twice
the longest silence that lately ended by itself. So nobody is left who is at most twice as late as
others, or it, were a while ago. Before the first token of a route, when prompts, replays and new
links make peers busy, it takes `NEW_PATIENCE` times as long, unless all others answer promptly
meanwhile: then answers are not late in general, only this one does not come. A stage that has just
been put in place of another gets the time that its replay takes.

Rejected: suspecting by silence alone (a long garbage collection at an idle moment would cost a
repair that nobody needs); the phi-accrual detector (Hayashibara 2004), whose estimate needs a
steady stream of heartbeats, where ours are sent only when it is quiet; blaming by the
deadline alone without asking (it names nobody: a stage that waits is as late as one that is slow).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hexswarm.messages import Progress
from hexswarm.records import PeerId

BEAT_S = 0.1
"""How often `Pulse.beat` and `Detector.beat` are called."""
PING_S = 0.4
"""A stage that is quiet for so long is pinged, and again after as long."""
SILENCE_S = 1.5
"""Silence of one stage beside others that are heard: over at least `PINGS` pings."""
PINGS = 3
"""At least so many, those of a companion but one."""
MOST_SILENCE_S = 4.0
"""However late answers were before, longer is not waited."""
COMPANION = 0.7
"""Who has been silent for this share of the time goes with one that was for the whole of it: those
that were lost together are replaced together."""
NEW_PATIENCE = 2.0
"""Before the first token all take longer: prompts, replays and new links make a peer busy. Not so
where all others answer promptly."""
PROMPT_S = 0.8
"""Silence, beside the way, of one that answers its first ping in good time."""
CALM_S = 60.0
"""Half-life of the memory of late answers."""
ALONE_S = 4.0
"""Silence of all stages at once."""
OVERDUE_S = 0.5
"""A token is overdue after this, or after four mean steps: sooner nobody is suspected."""
DEADLINE_S = 2.0
"""Least time without a token after which one that hangs is left; else ten mean steps."""
FIRST_OVERDUE_S = 1.0
"""The same before the first token, however long the prompt: who computes answers pings."""
FIRST_S = 4.0
"""The same for the first token; else four times the predicted time to it."""
ASK_AGAIN_S = 0.7
"""Least time between two questions to the stages; else a quarter of the deadline."""
ASK_MOST_S = 2.0
"""And the most, if they tell of work."""
STUCK_QUESTIONS = 3
"""So many times in a row nothing had moved: over 1.4 s, or half of the deadline."""
STUCK_S = 2.0
"""Least time without a move after the deadline, for one that has all that it needs."""
BUSY_S = 30.0
"""However much it computes for others: so long without a move it is left."""
WINDOW = 8
"""Steps whose median is the pace."""
SLOWER = 3.0
SLOWER_S = 0.03
"""A ring is slow beyond this factor and this difference."""
MOST = 0.6
"""A straggler accounts for this share of what all stages take longer than they announced."""
SLOW_AGAIN_S = 5.0
"""Least time between two complaints about the pace; doubles each time."""


# --- decisions ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """Have all stages tell how far they are."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """Leave this stage: it `how`."""

    peer: PeerId
    how: str
    beside: PeerId | None = None
    """The neighbour whose output does not reach it: what is lost may be the way alone."""


@dataclass(frozen=True, slots=True)
class Slow:
    """This stage takes `step_s` a step, far more than it announced; leave it if that pays."""

    peer: PeerId
    step_s: float


Decision = Ask | Suspect | Slow


# --- signs of life ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Life:
    heard_s: float
    """When something came last."""
    quiet_s: float = 0.0
    """Since then, as far as we listened."""
    pings: int = 0
    """Sent since then."""
    asked_s: float = 0.0
    """How long it had been quiet at the first of them."""
    pinged_s: float = -math.inf


class Pulse:
    """How long each peer has been quiet while we listened; shared by all turns of a client."""

    def __init__(self) -> None:
        self._lives: dict[PeerId, _Life] = {}
        self._beat_s: float | None = None
        self._worst_s = 0.0
        self._worst_at_s = 0.0
        self._answers: deque[tuple[float, PeerId, float]] = deque()
        """When who answered a ping lately, and how long it had been quiet."""

    def beat(self, now: float, silent_s: Mapping[PeerId, float]) -> list[PeerId]:
        """Take note of the links' silences; the peers to ping. Others are forgotten."""
        # However late this beat comes, what we did not listen to is nobody's silence.
        listened_s = 0.0 if self._beat_s is None else min(now - self._beat_s, 2 * BEAT_S)
        self._beat_s = now
        for peer in self._lives.keys() - silent_s.keys():
            del self._lives[peer]
        while self._answers and now - self._answers[0][0] > NEW_PATIENCE * MOST_SILENCE_S:
            self._answers.popleft()
        return [
            peer for peer, quiet_s in silent_s.items() if self._note(peer, quiet_s, now, listened_s)
        ]

    def _note(self, peer: PeerId, silent_s: float, now: float, listened_s: float) -> bool:
        heard_s = now - silent_s
        life = self._lives.get(peer)
        if life is None:
            self._lives[peer] = life = _Life(heard_s)
        elif heard_s > life.heard_s + 1e-6:
            self._remember(life.quiet_s, now)
            if life.pings:
                self._answers.append((now, peer, life.quiet_s))
            self._lives[peer] = life = _Life(heard_s, min(silent_s, listened_s))
        else:
            life.quiet_s += listened_s
        if silent_s < PING_S or now - life.pinged_s < PING_S or math.isinf(silent_s):
            return False
        if not life.pings:
            life.asked_s = life.quiet_s
        life.pings += 1
        life.pinged_s = now
        return True

    def _remember(self, quiet_s: float, now: float) -> None:
        if self._worst(now) < quiet_s <= MOST_SILENCE_S:  # what was longer was no lateness
            self._worst_s, self._worst_at_s = quiet_s, now

    def _worst(self, now: float) -> float:
        """The longest silence that ended by itself; fades."""
        return self._worst_s * math.pow(0.5, (now - self._worst_at_s) / CALM_S)

    def heard(self, peers: Iterable[PeerId]) -> bool:
        """Was one of them heard within two pings?"""
        lives = (self._lives.get(peer) for peer in peers)
        return any(life is not None and life.quiet_s < 2 * PING_S for life in lives)

    def quiet_s(self, peer: PeerId) -> float:
        life = self._lives.get(peer)
        return 0.0 if life is None else life.quiet_s

    def silent(self, peer: PeerId, now: float, rtt_s: float = 0.0, patience: float = 1.0) -> bool:
        """Has it missed so many pings, for so long, that it should have answered?"""
        life = self._lives.get(peer)
        if life is None or life.pings < PINGS - (patience < 1.0):
            return False
        most_s = min(1.0, patience) * MOST_SILENCE_S
        usual_s = min(most_s, patience * max(SILENCE_S, 2 * self._worst(now)))
        # Counted from the first ping, however late we sent it.
        return life.quiet_s - life.asked_s >= usual_s - PING_S + rtt_s

    def alone(self, peer: PeerId, rtts_s: Mapping[PeerId, float]) -> bool:
        """Are answers prompt in general, as long as it has been quiet? Those of the others that
        still can be; who is as silent as it is lost with it, and no witness of a busy machine."""
        life = self._lives.get(peer)
        if life is None:
            return False
        late = [
            other.quiet_s - rtts_s.get(name, 0.0)
            for name, other in self._lives.items()
            if name != peer and other.quiet_s - other.asked_s <= SILENCE_S
        ]
        answers = [
            quiet_s - rtts_s.get(name, 0.0)
            for at_s, name, quiet_s in self._answers
            if name != peer and at_s > life.heard_s
        ]
        return len(answers) >= PINGS - 1 and max(late + answers) <= PROMPT_S

    @property
    def peers(self) -> Collection[PeerId]:
        return self._lives.keys()


# --- one turn -----------------------------------------------------------------------------------


class Detector:
    """Judges one running turn. `expected_s` are the stages' own seconds a step, as predicted."""

    def __init__(
        self,
        now: float,
        known: int,
        *,
        ttft_s: float,
        tpot_s: float,
        expected_s: Mapping[PeerId, float],
    ) -> None:
        """`known` token ids are known to the client: the prompt."""
        self._slow_wait_s = SLOW_AGAIN_S
        self._slow_after_s = now
        self._begin(now, known, ttft_s, tpot_s, expected_s)

    def replaced(
        self,
        now: float,
        known: int,
        *,
        replay_s: float,
        tpot_s: float,
        expected_s: Mapping[PeerId, float],
    ) -> None:
        """Other stages from now on, which first have to replay: that is nobody's fault."""
        self._begin(now, known, replay_s, tpot_s, expected_s)
        self._slow_after_s = now + self._slow_wait_s

    def _begin(
        self,
        now: float,
        known: int,
        first_s: float,
        tpot_s: float,
        expected_s: Mapping[PeerId, float],
    ) -> None:
        self._stages = tuple(expected_s)
        self._expected_s = dict(expected_s)
        self._predicted_s = tpot_s
        self._known = known
        self._first = True
        self._first_s = max(FIRST_S, 4 * first_s)
        self._token_s = now
        """When the last token came, or the turn began."""
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._mean_s = 0.0
        self._best_s = math.inf
        self._asked_s = -math.inf
        self._ask_more_s = 0.0
        """So much later than usual the stages are asked again: they are at work."""
        self._told: dict[PeerId, tuple[int, int]] = {}
        self._computed: dict[PeerId, tuple[int, float]] = {}
        """What each told last of its work for all, and when it had last told another number."""
        self._unmoved = 0
        self._cut: Suspect | None = None
        """Who was cut off from a neighbour, by the last answers."""
        self._still_s = now
        """Since when nobody told of a move."""
        self._checks_pace = False

    # --- what is known --------------------------------------------------------------------------

    @property
    def token_s(self) -> float:
        """When the last token came."""
        return self._token_s

    @property
    def pace_s(self) -> float | None:
        """Median of the last steps; None if there were too few."""
        return statistics.median(self._steps) if len(self._steps) >= WINDOW // 2 else None

    @property
    def deadline_s(self) -> float:
        """Time without a token after which somebody is to be left."""
        return self._first_s if self._first else max(DEADLINE_S, 10 * self._mean_s)

    @property
    def overdue_s(self) -> float:
        """Time without a token after which one that is silent may be left."""
        late_s = max(OVERDUE_S, 4 * self._mean_s)
        return max(late_s, FIRST_OVERDUE_S) if self._first else late_s

    # --- what happens ---------------------------------------------------------------------------

    def beat(
        self,
        now: float,
        known: int,
        pulse: Pulse,
        rtts_s: Mapping[PeerId, float] | None = None,
        *,
        owed: bool = True,
    ) -> list[Decision]:
        """So many token ids are known now. `owed`: the stages have something to compute; else it
        is the caller's turn to speak."""
        if known > self._known:
            self._count(now, known - self._known)
            self._known = known
        elif not owed:
            self._token_s = now
        else:
            return self._waiting(now, pulse, rtts_s or {})
        return self._pace(now)

    def progress(self, now: float, told: Mapping[PeerId, Progress], known: int) -> list[Decision]:
        """What the stages answered to the last question, as far as they did."""
        if known > self._known or self._checks_pace:
            return self._slowest(told)
        if not told:  # nobody is heard: that is for `_waiting` to judge
            return []
        where = {peer: (item.received, item.done) for peer, item in told.items()}
        first, moved = not self._told, where != self._told
        if moved:
            self._told, self._unmoved, self._still_s = where, 0, now
        self._unmoved += 1
        for peer, item in told.items():
            if self._computed.get(peer, (-1, now))[0] != item.computed:
                self._computed[peer] = item.computed, now
        found = culprit(self._stages, told, known)
        self._cut = found if found.beside is not None else None
        if found.beside is not None:
            self._ask_later(moved and not first)
            return self._leave(found) if self._unmoved >= STUCK_QUESTIONS else []
        late_s, still_s = now - self._token_s - self.deadline_s, now - self._still_s
        idle_s = min(still_s, now - self._computed.get(found.peer, (0, -math.inf))[1])
        self._ask_later(idle_s <= 0.0 and not first)
        stuck = min(late_s, idle_s) >= self._stuck_s or min(late_s, still_s) >= BUSY_S
        return self._leave(found) if stuck and self._unmoved >= STUCK_QUESTIONS else []

    def agree(self, lost: Collection[tuple[PeerId, PeerId]]) -> list[Decision]:
        """Other turns have lost these ways lately, from the second to the first: if this one seems
        to wait for one of them, one answer less is enough."""
        found = self._cut
        if found is None or (found.peer, found.beside) not in lost:
            return []
        return self._leave(found) if self._unmoved >= STUCK_QUESTIONS - 1 else []

    # --- inside ---------------------------------------------------------------------------------

    def _leave(self, found: Suspect) -> list[Decision]:
        self._unmoved, self._cut = 0, None
        return [found]

    def _ask_later(self, at_work: bool) -> None:
        more_s = self._ask_more_s + ASK_AGAIN_S / 2 if at_work else 0.0
        self._ask_more_s = min(more_s, ASK_MOST_S - ASK_AGAIN_S)

    def _count(self, now: float, tokens: int) -> None:
        step_s = (now - self._token_s) / tokens
        self._token_s, self._told, self._unmoved, self._ask_more_s = now, {}, 0, 0.0
        self._cut = None
        if self._first:  # the time to the first token is no step, but no step takes longer
            self._first, self._mean_s = False, min(self._predicted_s, step_s)
            return
        for _ in range(min(tokens, WINDOW)):
            self._steps.append(step_s)
            self._mean_s += 0.1 * (step_s - self._mean_s)
        if len(self._steps) == WINDOW:
            self._best_s = min(self._best_s, statistics.median(self._steps))

    def _waiting(self, now: float, pulse: Pulse, rtts_s: Mapping[PeerId, float]) -> list[Decision]:
        waited_s = now - self._token_s
        if waited_s < self.overdue_s:
            return []
        silent = self._silent(now, pulse, rtts_s)
        if silent and (pulse.heard(pulse.peers) or self._alone(silent, pulse, waited_s)):
            return [Suspect(p, f"was silent for {pulse.quiet_s(p):.1f} s") for p in silent]
        if waited_s >= self._ask_s and now - self._asked_s >= self._ask_again_s:
            self._asked_s, self._checks_pace = now, False
            return [Ask()]
        return []

    def _silent(self, now: float, pulse: Pulse, rtts_s: Mapping[PeerId, float]) -> list[PeerId]:
        """Stages that should have been heard by now, and those that were lost with them."""

        def missing(peer: PeerId, share: float) -> bool:
            if self._first and not pulse.alone(peer, rtts_s):
                share *= NEW_PATIENCE
            return pulse.silent(peer, now, rtts_s.get(peer, 0.0), share)

        if not any(missing(peer, 1.0) for peer in self._stages):
            return []
        return [peer for peer in self._stages if missing(peer, COMPANION)]

    def _alone(self, silent: Sequence[PeerId], pulse: Pulse, waited_s: float) -> bool:
        """Nobody at all was heard, for so long that waiting longer does not help."""
        longest_s = min(pulse.quiet_s(peer) for peer in silent)
        return longest_s >= ALONE_S and waited_s >= self.deadline_s

    @property
    def _ask_s(self) -> float:
        """Time without a token after which the stages are asked for the first time."""
        return max(FIRST_OVERDUE_S, self._first_s / 4) if self._first else self.overdue_s

    @property
    def _ask_again_s(self) -> float:
        return max(ASK_AGAIN_S + self._ask_more_s, self.deadline_s / 4)

    @property
    def _stuck_s(self) -> float:
        """So long after the deadline nothing may have moved: one that computes may be busy."""
        return max(STUCK_S, self.deadline_s / 2)

    def _pace(self, now: float) -> list[Decision]:
        if len(self._steps) < WINDOW or now < self._slow_after_s:
            return []
        usual_s = self._best_s if self._predicted_s <= 0 else min(self._best_s, self._predicted_s)
        pace_s = statistics.median(self._steps)
        if pace_s <= SLOWER * usual_s or pace_s <= usual_s + SLOWER_S:
            return []
        self._slow_after_s = now + self._slow_wait_s
        self._slow_wait_s *= 2
        self._asked_s, self._checks_pace = now, True
        return [Ask()]

    def _slowest(self, told: Mapping[PeerId, Progress]) -> list[Decision]:
        """The stage that accounts for most of what the ring is slower than usual.

        Where a whole machine is busy all its stages are slower, and none of them is to be left.
        """
        if not self._checks_pace:
            return []
        self._checks_pace = False
        excess_s = {
            peer: item.step_s - self._expected_s[peer]
            for peer, item in told.items()
            if peer in self._expected_s and item.step_s > SLOWER * self._expected_s[peer]
        }
        total_s = sum(excess_s.values())
        worst = max(excess_s, key=lambda peer: (excess_s[peer], peer), default=None)
        if worst is None or excess_s[worst] < max(SLOWER_S, MOST * total_s):
            return []
        return [Slow(worst, told[worst].step_s)]


def culprit(stages: Sequence[PeerId], told: Mapping[PeerId, Progress], known: int) -> Suspect:
    """Who keeps a ring from moving that stands still, read from the head on.

    A stage that does not answer although its link is alive hangs. One whose input was not computed
    hangs too. One that lacks what the stage before it has sent is cut off; the head gets its input
    from the tail, as far as the client knows it. If all have done all, the tail keeps it to itself.
    """
    for peer in stages:
        if peer not in told:
            return Suspect(peer, "does not say how far it is")
    sent, before = known, stages[-1]
    for peer in stages:
        here = told[peer]
        if here.received < sent:
            beside = before if before != peer else None
            return Suspect(peer, "did not get what the stage before it sent", beside)
        if here.done < here.received:
            return Suspect(peer, "does not finish its step")
        sent, before = here.done, peer
    return Suspect(stages[-1], "keeps its answer to itself")
