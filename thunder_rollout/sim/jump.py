"""Steps of a simulated engine that are alike, taken in one go."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thunder_rollout.sim.engine import SimTurn


@dataclass(slots=True)
class Jump:
    """`num_steps` steps from `began_at`; the i-th (from 0) takes first_s + i x growth_s."""

    began_at: float
    num_steps: int
    first_s: float = 0.0
    growth_s: float = 0.0
    may_stop: bool = False  # a new turn could join at any of its steps
    joining: list[SimTurn] = field(default_factory=list)  # their prefill ends with it
    num_paid: int = 0  # steps for which the decoding turns have their blocks

    def time_of(self, num_steps: int) -> float:
        return num_steps * self.first_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def stop_by(self, now: float) -> None:
        """End with the first step that is over at `now` or later."""
        elapsed = now - self.began_at
        steep = self.first_s - self.growth_s / 2
        if self.growth_s > 0:
            guess = (math.sqrt(steep * steep + 2 * self.growth_s * elapsed) - steep) / self.growth_s
        else:
            guess = elapsed / self.first_s
        steps = max(1, math.ceil(guess) - 1)
        while steps < self.num_steps and self.began_at + self.time_of(steps) < now:
            steps += 1
        self.num_steps = min(self.num_steps, steps)
