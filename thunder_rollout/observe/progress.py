"""What one sees while a rollout runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from thunder_rollout.observe.metrics import MetricsSnapshot


@dataclass(slots=True)
class SampleCounts:
    """How far the samples are; the driver keeps it up to date."""

    total: int
    done: int = 0
    resolved: int = 0
    running: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Progress:
    """Context manager; `update` may be called as often as one likes."""

    def __init__(self, title: str, *, enabled: bool, line_every_s: float, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console(stderr=True)
        self._enabled = enabled
        self._line_every_s = line_every_s
        self._last_line_at = float("-inf")
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._enabled and self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, counts: SampleCounts, metrics: MetricsSnapshot, sandboxes: int) -> None:
        if not self._enabled:
            return
        if self._live is not None:
            self._live.update(self._table(counts, metrics, sandboxes))
        elif time.monotonic() - self._last_line_at >= self._line_every_s:
            self._last_line_at = time.monotonic()
            self._console.print(self._line(counts, metrics, sandboxes), highlight=False, soft_wrap=True)

    def _table(self, counts: SampleCounts, metrics: MetricsSnapshot, sandboxes: int) -> Table:
        table = Table(title=self._title, title_justify="left")
        cells = self._cells(counts, metrics, sandboxes)
        for name in cells:
            table.add_column(name, justify="right")
        table.add_row(*cells.values())
        return table

    def _line(self, counts: SampleCounts, metrics: MetricsSnapshot, sandboxes: int) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._cells(counts, metrics, sandboxes).items())

    @staticmethod
    def _cells(counts: SampleCounts, metrics: MetricsSnapshot, sandboxes: int) -> dict[str, str]:
        usage = [f"{b.demand_tokens / b.capacity_tokens:.0%}" for b in metrics.scheduler.backends]
        cells = {
            "done": f"{counts.done}/{counts.total}",
            "resolved": f"{counts.resolved}",
            "running": f"{counts.running}",
            "steps/min": f"{metrics.steps_per_min:.0f}",
            "KV hits": f"{metrics.kv_hit_rate:.0%}",
            "KV demand": " ".join(usage),
            "waiting": f"{metrics.scheduler.num_waiting}",
            "pauses": f"{metrics.num_pauses}",
            "sandboxes": f"{sandboxes}",
        }
        if counts.failures:
            cells["failures"] = " ".join(f"{kind}:{n}" for kind, n in counts.failures.items())
        return cells
