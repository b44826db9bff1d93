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
value. A first step of any shape splits as a small batch on a CPU does (a row costs about 0.13 of a
weight read), outliers (a swapped page, a first compile) are clipped.
"""

from __future__ import annotations

_FORGET = 0.95
"""Weight of the past at each step: about 20 steps are remembered."""

_PULL = 0.05
"""Weight of the previous estimate, in steps."""

_CLIP = 4.0
"""A measurement counts as at most so many times more or less than was predicted."""

_ROW_SHARE = 0.13
"""What a row costs of a batch of one, until measured (SmolLM2 on a CPU)."""

_TINY_S = 1e-9


class StepTime:
    """The running fit; without observations it predicts `guess_s` for one row."""

    def __init__(self, guess_s: float = 0.01) -> None:
        self._theta = _split(guess_s, 1)
        self._normal = [[0.0] * 3 for _ in range(3)]
        self._target = [0.0] * 3
        self.observed = False

    def observe(self, rows: int, tokens: int, elapsed_s: float) -> None:
        """Learn from a batch of `rows` decode rows and `tokens` prompt tokens."""
        elapsed_s = max(elapsed_s, _TINY_S)
        if self.observed:
            expected_s = self.predict(rows, tokens)
            elapsed_s = min(max(elapsed_s, expected_s / _CLIP), expected_s * _CLIP)
        else:
            self._theta = _split(elapsed_s, rows + tokens)
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
        floor_s = max(sum(theta), _TINY_S) * 1e-3
        self._theta = (max(theta[0], floor_s), max(theta[1], floor_s), max(theta[2], floor_s))


def _split(seconds: float, units: int) -> tuple[float, float, float]:
    """Coefficients of a step that took `seconds` for `units` rows and tokens together."""
    unit = seconds / (1 - _ROW_SHARE + _ROW_SHARE * units)
    return (1 - _ROW_SHARE) * unit, _ROW_SHARE * unit, _ROW_SHARE * unit
