"""What a router did, in the names under which verl's logger gets it."""

from __future__ import annotations

from dataclasses import dataclass

from thunder_rollout.observe.metrics import MetricsSnapshot


@dataclass(slots=True)
class RouterMetrics:
    """From its making on; turns of validation do not count where they can be told from others: `thunder_swe` names
    them so, and for other loops by how they sample, if training does not sample alike."""

    num_turns: int = 0
    num_cut: int = 0  # turns aborted by an update or a rebalancing
    num_reclaimed: int = 0  # turns whose caller died
    prompt_tokens: int = 0
    queue_s: float = 0.0
    max_queue_s: float = 0.0

    def granted(self, *, prompt_tokens: int, queue_s: float) -> None:
        self.num_turns += 1
        self.prompt_tokens += prompt_tokens
        self.queue_s += queue_s
        self.max_queue_s = max(self.max_queue_s, queue_s)

    def figures(self, snapshot: MetricsSnapshot) -> dict[str, float]:
        """Counts and seconds from its making on; `num_pauses` and `imbalance` since the start; the rest as
        it is now (these of all traffic), in shares of all KV memory where it is memory."""
        scheduler = snapshot.scheduler
        capacity = sum(backend.capacity_tokens for backend in scheduler.backends) or 1
        figures = {
            "num_turns": self.num_turns,
            "num_cut_turns": self.num_cut,
            "num_reclaimed_turns": self.num_reclaimed,
            "prompt_tokens/mean": self.prompt_tokens / max(1, self.num_turns),
            "queue_s/mean": self.queue_s / max(1, self.num_turns),
            "queue_s/max": self.max_queue_s,
            "num_programs": scheduler.num_programs,
            "num_waiting": scheduler.num_waiting_new + scheduler.num_waiting_returning,
            "num_in_flight": sum(backend.num_in_flight for backend in scheduler.backends),
            "num_pauses": snapshot.num_pauses,
            "imbalance": snapshot.imbalance,
            "demand_share": sum(backend.demand_tokens for backend in scheduler.backends) / capacity,
            "waiting_share": scheduler.pending_tokens / capacity,
        }
        return {f"thunder/router/{name}": float(value) for name, value in figures.items()}
