"""Which turn is it that brings engines down? What one turn has to know to find out.

Contract: the turns that ran when an engine failed at its work run again in companies of at most an
`NARROWING`th of their number, wherever the scheduler sends them (`EngineHost` sees to it), and so on with
those of a company under which an engine failed again. Whoever finishes is cleared. A turn under which an engine
failed while it ran alone, and under suspicion, is found out. So of n turns the one that does it takes
about 2 + log(n) / log(`NARROWING`) engines down, and at each of these stages an engine runs small
companies for `NARROWING` times a turn's length at most, shared by all engines.

An engine that was killed may have been killed from outside, or for the memory that a turn took; the signal
is the same. One such death says nothing of the turns that ran. From the `SUSPECTED_AFTER`th under the same turn
on they count as failures, but it is found out by `PROVED_AFTER` of them at the earliest, the last of which
came while it ran alone: nobody kills the engines under one turn so often from outside.
"""

from __future__ import annotations

from dataclasses import dataclass

from thunder_rollout.errors import EngineDied

NARROWING = 8  # a death costs more (a restart, and every turn on that engine) than a company that runs to its end
SUSPECTED_AFTER = 4
PROVED_AFTER = 11

_MANY = 256  # turns that ran, where an engine's whole actor is gone and nobody knows


@dataclass(slots=True)
class Suspicion:
    """Of one turn, from its request to its result. `max_together`: how many may run where it runs, itself
    among them; None: any number."""

    max_together: int | None = None
    num_deaths: int = 0
    num_kills: int = 0  # of the deaths, those for which nobody is blamed
    is_proved: bool = False

    def add(self, death: EngineDied) -> None:
        """The turn heard of the death of the engine that it was sent to."""
        if death.num_together == 0:
            return
        self.num_deaths += 1
        self.num_kills += not death.by_turn
        if death.by_turn or self.num_kills >= SUSPECTED_AFTER:
            self.is_proved = self.max_together == 1 and (death.by_turn or self.num_kills >= PROVED_AFTER)
            self.max_together = max(1, (death.num_together or self.max_together or _MANY) // NARROWING)
