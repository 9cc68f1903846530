"""What a turn costs its engine, learned on line (tokens, seconds):

    duration = a + b x uncached + c x uncached x context + d x output + e x output x turns beside it
               + f x loaded from host memory

An engine prefills a turn's tokens for itself alone but decodes all turns together, so b and c are
seconds of the whole engine. `ServiceClock` advances by dt / (turns in flight): how far it went while
a turn ran is the turn's even share of the engine, its service, and duration / service the turns
beside it. Discounted least squares of the relative error, from a prior.

How much one more turn takes from the others is not read off this fit, whose terms go together in a
steady state; `load_curve` has it.
"""

from __future__ import annotations

from thunder_rollout.core.policies.adaptive.load_curve import LoadCurve

_SCALE_TOKENS = 1000.0  # features are in thousands of tokens, so that all are of one order
_NUM_FEATURES = 6
_LEAST_DURATION_S = 1e-6
_TURNS_A_FIT = 8  # the fit follows so many turns behind
_RIDGE = 0.01  # pull towards the even cost, as a share of what was seen


class ServiceClock:
    """Seconds of service that each turn in flight has had since the start."""

    __slots__ = ("_at_s", "num_in_flight", "served_s")

    def __init__(self) -> None:
        self.served_s = 0.0
        self.num_in_flight = 0
        self._at_s = 0.0

    def advance(self, now: float) -> None:
        """To be called before `num_in_flight` changes."""
        self.served_s += (now - self._at_s) / max(1, self.num_in_flight)
        self._at_s = now


class PrefillModel:
    """See the module."""

    def __init__(self, *, prior_token_s: float, forgetting: float, prior_load_token_s: float = 0.0) -> None:
        """Priors: seconds to prefill a token, and to load one, before anything was seen."""
        self._prior_token_s = prior_token_s
        self._prior_load = prior_load_token_s * _SCALE_TOKENS
        self._load = self._prior_load
        self._forgetting = forgetting
        self._products = [[0.0] * _NUM_FEATURES for _ in range(_NUM_FEATURES)]  # discounted sums of x x^T
        self._targets = [0.0] * _NUM_FEATURES  # of x y
        self._linear, self._quadratic = prior_token_s * _SCALE_TOKENS, 0.0
        self._load_curve = LoadCurve()
        self._crowding = 1.0
        self._num_unsolved = 0
        self.mean_turn_s = 0.0  # of service, a running mean
        self.num_turns = 0

    def add(
        self,
        *,
        uncached_tokens: int,
        prompt_tokens: int,
        output_tokens: int,
        duration_s: float,
        service_s: float,
        loaded_tokens: int = 0,
    ) -> None:
        uncached, output = uncached_tokens / _SCALE_TOKENS, output_tokens / _SCALE_TOKENS
        beside = duration_s / service_s if service_s > 0 else 1.0
        duration_s = max(duration_s, _LEAST_DURATION_S)
        loaded = loaded_tokens / _SCALE_TOKENS
        terms = (1.0, uncached, output * beside, uncached * prompt_tokens / _SCALE_TOKENS, output, loaded)
        features = [term / duration_s for term in terms]
        forgetting = self._forgetting
        for row, feature in zip(self._products, features, strict=True):
            for index, other in enumerate(features):
                row[index] = forgetting * row[index] + feature * other
        self._targets = [forgetting * t + f for t, f in zip(self._targets, features, strict=True)]
        self.num_turns += 1
        self._num_unsolved += 1
        self.mean_turn_s += (service_s - self.mean_turn_s) / min(self.num_turns, 100)
        if 2 * (uncached_tokens + loaded_tokens) <= prompt_tokens:  # the others tell of their prefill or load
            self._load_curve.add(beside=beside, tokens=max(1, output_tokens), duration_s=duration_s)

    def prefill_s(self, uncached_tokens: float, context_tokens: float) -> float:
        """Seconds of the engine to prefill `uncached_tokens` of a context."""
        if self._num_unsolved >= _TURNS_A_FIT:
            self._fit()
        uncached = uncached_tokens / _SCALE_TOKENS
        return uncached * (self._linear + self._quadratic * context_tokens / _SCALE_TOKENS)

    def load_s(self, tokens: float) -> float:
        """Seconds until `tokens` of a context are back from host memory."""
        if self._num_unsolved >= _TURNS_A_FIT:
            self._fit()
        return tokens / _SCALE_TOKENS * self._load

    @property
    def crowding(self) -> float:
        """See `LoadCurve.crowding`."""
        if self._num_unsolved >= _TURNS_A_FIT:
            self._fit()
        return self._crowding

    def _fit(self) -> None:
        """Least squares, held towards a turn whose every token costs the same. A term that comes out
        negative is not there."""
        self._num_unsolved = 0
        tokens = self._products[0][1] + self._products[0][2]
        even = self._targets[0] / tokens if tokens > 0 else self._prior_token_s * _SCALE_TOKENS
        centre = (0.0, even, even, 0.0, 0.0, self._prior_load)
        kept = list(range(_NUM_FEATURES))
        while True:
            weights = dict(zip(kept, self._weights(kept, centre), strict=True))
            negative = [index for index in kept[1:] if weights[index] < 0]
            if not negative:
                break
            kept.remove(negative[-1])
        self._linear, self._quadratic = max(weights.get(1, 0.0), even / 10), weights.get(3, 0.0)
        self._load = weights.get(5, 0.0)
        self._crowding = self._load_curve.crowding()

    def _weights(self, kept: list[int], centre: tuple[float, ...]) -> list[float]:
        matrix = [[self._products[row][column] for column in kept] for row in kept]
        target = [self._targets[row] for row in kept]
        for position, index in enumerate(kept):
            ridge = _RIDGE * self._products[index][index] + 1e-9 * self._products[0][0]
            matrix[position][position] += ridge
            target[position] += ridge * centre[index]
        return _solve(matrix, target)


def _solve(matrix: list[list[float]], target: list[float]) -> list[float]:
    """Gauss on a symmetric positive definite matrix."""
    size = len(target)
    rows = [[*row, value] for row, value in zip(matrix, target, strict=True)]
    for pivot in range(size):
        for below in range(pivot + 1, size):
            factor = rows[below][pivot] / rows[pivot][pivot]
            for column in range(pivot, size + 1):
                rows[below][column] -= factor * rows[pivot][column]
    solution = [0.0] * size
    for index in reversed(range(size)):
        rest = sum(rows[index][column] * solution[column] for column in range(index + 1, size))
        solution[index] = (rows[index][size] - rest) / rows[index][index]
    return solution
