"""Which turn is it that brings engines down? What one turn has to know to find out.

Contract: the turns that ran when an engine failed at its work run again in companies of at most an
`NARROWING`th of their number, wherever the scheduler sends them (`EngineHost` sees to it), and so on with
those of a company under which an engine failed again. Whoever finishes is cleared. A turn under which an engine
failed while it ran alone, and under suspicion, is found out. So of n turns the one that does it takes
about 2 + log(n) / log(`NARROWING`) engines down, and at each of these stages an engine runs small
companies for `NARROWING` times a turn's length at most, shared by all engines. An engine that was killed
from outside is never held against a turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from thunder_rollout.errors import EngineDied

NARROWING = 8  # a death costs more (a restart, and every turn on that engine) than a company that runs to its end


@dataclass(slots=True)
class Suspicion:
    """Of one turn, from its request to its result. `max_together`: how many may run where it runs, itself
    among them; None: any number."""

    max_together: int | None = None
    num_deaths: int = 0
    is_proved: bool = False

    def add(self, death: EngineDied) -> None:
        """The turn heard of the death of the engine that it was sent to."""
        if not death.by_turn:
            return
        self.num_deaths += 1
        self.is_proved = self.max_together == 1
        self.max_together = max(1, (death.num_together or 1) // NARROWING)
