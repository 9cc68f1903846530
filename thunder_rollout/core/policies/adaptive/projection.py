"""What a backend is expected to hold as its programs grow and end, at some steps of growth ahead: the sum of
its programs' own curves (`growth`)."""

from __future__ import annotations

from collections.abc import Mapping

from thunder_rollout.core.policies.adaptive.accounts import BackendAccount, ProgramAccount
from thunder_rollout.core.policies.adaptive.growth import Growth

_POINTS = (0.0, *(2.0 ** (exponent / 2) for exponent in range(-20, -1)))  # growth, as shares of capacity


class Projection:
    """Keeps `BackendAccount.curve` of `backends`."""

    def __init__(self, growth: Growth, backends: Mapping[str, BackendAccount]) -> None:
        self._growth = growth
        self._backends = backends

    def size(self, backend: BackendAccount) -> None:
        """Its capacity is known, or another one; for a backend without programs."""
        backend.points = tuple(share * backend.capacity_tokens for share in _POINTS)
        backend.curve = [0.0] * len(_POINTS)
        backend.num_left = [0.0] * len(_POINTS)

    def follow(self, program: ProgramAccount, backend: str | None) -> None:
        """The program's growth counts there, and nowhere else, as its context has it now."""
        if (backend, program.context_tokens) == (program.curve_backend, program.curve_tokens):
            return
        if program.curve_backend is not None:
            _add(self._backends[program.curve_backend], program, -1)
        program.curve_backend, program.curve_tokens, program.curve = backend, program.context_tokens, []
        if backend is not None:
            account = self._backends[backend]
            program.curve = self._growth.curve(program.kind, program.context_tokens, account.points)
            _add(account, program, 1)

    def peak_tokens(
        self,
        program: ProgramAccount,
        context_tokens: int,
        backend: BackendAccount,
        *,
        unique_tokens: float,
        added: float,
    ) -> float:
        """The most that the backend is expected to need at once if the program joins: all grow at one pace, and
        leave as programs of their kind did. What programs share counts once, and what they grow by is nobody
        else's: `unique_tokens` of blocks are there now, the program brings `added` tokens of its context."""
        joining = self._growth.curve(program.kind, context_tokens, backend.points)
        shared = max(0.0, backend.curve[0] - unique_tokens - backend.private_tokens)
        shared_each = shared / backend.num_curves if backend.num_curves else 0.0
        own = min(added, context_tokens)
        return max(
            [
                bound - shared_each * num_left + tokens * (own + point) / (context_tokens + point)
                for point, bound, num_left, tokens in zip(
                    backend.points, backend.curve, backend.num_left, joining, strict=True
                )
            ]
        )


def _add(backend: BackendAccount, program: ProgramAccount, sign: int) -> None:
    backend.num_curves += sign
    if backend.num_curves:
        context, curve, points = program.curve_tokens, program.curve, backend.points
        backend.curve = [total + sign * tokens for total, tokens in zip(backend.curve, curve, strict=True)]
        backend.num_left = [
            total + sign * tokens / (context + point)
            for total, tokens, point in zip(backend.num_left, curve, points, strict=True)
        ]
    else:  # and nothing that rounding left
        backend.curve = [0.0] * len(backend.points)
        backend.num_left = [0.0] * len(backend.points)
