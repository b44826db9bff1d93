"""Seconds of a batch: `a + b x decode rows + c x prompt tokens`, learnt from real steps.

`a` is the one read of the weights that every batch pays, `b` the KV read and overhead of a decode
row, `c` the arithmetic of a prompt token. The scheduler asks how many prompt tokens fit beside the
decodes, the announcement asks how many seconds of work wait. Nothing is configured: a peer learns
itself, and follows when its owner starts a game beside it.

The fit is least squares with exponential forgetting, each step weighted by one over its time (2 ms
matter more in a 5 ms step than in a 200 ms one; by the square, a machine that got slower would be
believed fast for long), and a weak pull towards the previous estimate. The pull is what makes it
robust: a peer that sees only batches of one row cannot tell `a` from `b`, and plain recursive least
squares then drifts or explodes in the direction it never sees; here that direction keeps its last
value. A first step of any shape splits as the probe found at start, or as a small batch on a CPU
does (a row costs about 0.13 of a weight read); outliers (a swapped page, a first compile) are
clipped.
"""

from __future__ import annotations

from hexswarm.records import Speed

CHUNK_TOKENS = 128
"""The probe measures a prompt token in a piece of this length."""

_FORGET = 0.95
"""Weight of the past at each step: about 20 steps are remembered."""

_PULL = 0.05
"""Weight of the previous estimate, in steps."""

_CLIP = 4.0
"""A measurement counts as at most so many times more or less than was predicted."""

_SHARES = (0.87, 0.13, 0.13)
"""What the read, a row and a token cost of a batch of one, until measured (SmolLM2 on a CPU)."""

_FLOOR = 1e-3
"""Least share of a coefficient in the sum of the three."""

_TRUST = 0.25
"""The same as a part of what the probe found: on a busy machine the noise of the steps would else
make rows seem free, and a peer full of sessions idle."""

_TINY_S = 1e-9


class StepTime:
    """The running fit; without observations it predicts `guess_s` for one row."""

    def __init__(
        self, guess_s: float = 0.01, *, shares: tuple[float, float, float] = _SHARES
    ) -> None:
        """`shares` are the costs of read, row and token in any unit; see `probed`."""
        self._shares = shares
        self._floors = (_FLOOR, _FLOOR, _FLOOR)
        self._theta = _split(guess_s, 1, 0, shares)
        self._normal = [[0.0] * 3 for _ in range(3)]
        self._target = [0.0] * 3
        self.observed = False

    @classmethod
    def probed(cls, speed: Speed, layers: int) -> StepTime:
        """What the probe found for `layers` layers, until real steps tell."""
        row_s = speed.row_layer_s * layers
        read_s = max(speed.decode_layer_s * layers - row_s, 0.0)
        token_s = max(speed.prefill_layer_s * layers - read_s / CHUNK_TOKENS, 0.0)
        made = cls(read_s + row_s, shares=(read_s, row_s, token_s))
        whole_s = max(read_s + row_s + token_s, _TINY_S)
        read, row, token = (_TRUST * part_s / whole_s for part_s in (read_s, row_s, token_s))
        made._floors = (max(_FLOOR, read), max(_FLOOR, row), max(_FLOOR, token))
        return made

    def observe(self, rows: int, tokens: int, elapsed_s: float) -> None:
        """Learn from a batch of `rows` decode rows and `tokens` prompt tokens."""
        elapsed_s = max(elapsed_s, _TINY_S)
        if self.observed:
            expected_s = self.predict(rows, tokens)
            elapsed_s = min(max(elapsed_s, expected_s / _CLIP), expected_s * _CLIP)
        else:
            self._theta = _split(elapsed_s, rows, tokens, self._shares)
            self.observed = True
        x = (1, rows, tokens)
        for i in range(3):
            self._target[i] = _FORGET * self._target[i] + x[i]
            for j in range(3):
                self._normal[i][j] = _FORGET * self._normal[i][j] + x[i] * x[j] / elapsed_s
        self._solve(elapsed_s)

    def predict(self, rows: int, tokens: int = 0) -> float:
        """Seconds for a batch; 0 for an empty one."""
        if not rows and not tokens:
            return 0.0
        a, b, c = self._theta
        return a + b * rows + c * tokens

    def marginal(self, rows: int, tokens: int) -> float:
        """The part of a batch's seconds that its rows and tokens add to the read."""
        _, b, c = self._theta
        return b * rows + c * tokens

    @property
    def read_s(self) -> float:
        """What every batch costs, whatever is in it."""
        return self._theta[0]

    def tokens_within(self, seconds: float, rows: int) -> int:
        """Prompt tokens that fit beside `rows` decode rows in a step of `seconds`."""
        a, b, c = self._theta
        return max(0, int((seconds - a - b * rows) / c))

    def _solve(self, scale_s: float) -> None:
        """Theta that minimises the weighted squared errors + the pull to the last theta."""
        matrix = [[*row, value] for row, value in zip(self._normal, self._target, strict=True)]
        for i, last in enumerate(self._theta):
            pull = _PULL * scale_s / last**2
            matrix[i][i] += pull
            matrix[i][3] += pull * last
        for i in range(3):  # Gauss; the matrix is positive definite, so no pivoting is needed
            for j in range(i + 1, 3):
                factor = matrix[j][i] / matrix[i][i]
                matrix[j] = [y - factor * x for x, y in zip(matrix[i], matrix[j], strict=True)]
        theta = [0.0] * 3
        for i in (2, 1, 0):
            rest = sum(matrix[i][j] * theta[j] for j in range(i + 1, 3))
            theta[i] = (matrix[i][3] - rest) / matrix[i][i]
        # Costs are positive, and a coefficient at zero could never be pulled up again.
        whole_s, (a, b, c) = max(sum(theta), _TINY_S), self._floors
        self._theta = (
            max(theta[0], a * whole_s),
            max(theta[1], b * whole_s),
            max(theta[2], c * whole_s),
        )


def _split(
    seconds: float, rows: int, tokens: int, shares: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Coefficients in proportion to `shares` of a step that took `seconds`."""
    read, row, token = (max(share, _TINY_S) for share in shares)
    unit = seconds / (read + rows * row + tokens * token)
    return read * unit, row * unit, token * unit
