"""The block-exact engine model behind the simulator's seam: the reference for `RunEngine`."""

from __future__ import annotations

import itertools

from thunder_rollout.engine.model import EngineModel, EngineShape, EngineTiming, Step
from thunder_rollout.sim.engine import NEVER, SimTurn

TOKENS_A_RUN = 1 << 20


class BlockEngine:
    """A run's tokens are its number x 2^20 + position, whoever computes them."""

    def __init__(self, shape: EngineShape, timing: EngineTiming) -> None:
        self.model = EngineModel(shape, timing)
        self.ends_at = NEVER
        self._numbers: dict[str, int] = {}
        self._turns: dict[str, SimTurn] = {}
        self._ids = itertools.count()
        self._step: Step | None = None

    @property
    def used_tokens(self) -> int:
        return self.model.used_tokens

    @property
    def num_preemptions(self) -> int:
        return self.model.num_preemptions

    def add(self, turn: SimTurn, now: float) -> None:
        turn.added_at = now
        request = f"r{next(self._ids)}"
        self._turns[request] = turn
        prompt = [self._token(turn, position) for position in range(turn.prompt_tokens)]
        self.model.add(request, prompt, turn.key)
        if self.ends_at == NEVER:
            self.ends_at = now

    def advance(self) -> list[SimTurn]:
        now = self.ends_at
        ended = []
        if self._step is not None:
            tokens = {r: self._token(self._turns[r], self._turns[r].num_tokens) for r in self._step.sampled}
            self.model.end_step(tokens)
            for request in self._step.sampled:
                turn = self._turns[request]
                turn.num_sampled += 1
                turn.first_token_at = min(turn.first_token_at, now)
                if turn.num_sampled == turn.output_tokens:
                    self.model.remove(request)
                    del self._turns[request]
                    ended.append(turn)
        self._step = self.model.begin_step()
        self.ends_at = NEVER if self._step is None else now + self._step.took_s
        for request in self._step.admitted if self._step else ():
            turn = self._turns[request]
            if turn.admitted_at == NEVER:
                turn.admitted_at = now
                turn.cached_tokens = self.model.cached_tokens(request)
        return ended

    def drop(self, key: str) -> None:
        raise NotImplementedError

    def release(self, key: str) -> None:
        self.model.release(key)

    def _token(self, turn: SimTurn, position: int) -> int:
        start = 0
        for part in turn.shared:
            end = start + part.num_blocks * self.model.shape.block_size
            if position < end:
                return self._number(part.key) * TOKENS_A_RUN + position
            start = end
        return self._number(turn.key) * TOKENS_A_RUN + position

    def _number(self, key: str) -> int:
        return self._numbers.setdefault(key, len(self._numbers))
