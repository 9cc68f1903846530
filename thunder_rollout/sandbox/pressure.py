"""How short a node is of CPU and memory, and what becomes of the sandboxes of waiting programs then."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from thunder_rollout.sandbox.protocol import Rest

FREEZE_CPU = 0.2  # of the last ten seconds somebody waited for a CPU for so much
FREEZE_FREE_MEMORY = 0.25  # less of the node's memory is free
STOP_FREE_MEMORY = 0.1

_AVERAGE = re.compile(r"^some avg10=([\d.]+)", re.MULTILINE)
_MEMORY = re.compile(r"^(MemTotal|MemAvailable):\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    cpu: float  # share of the time in which some process waited for a CPU; 0 where the kernel doesn't tell
    free_memory: float  # share that can be had without swapping


def read_pressure(proc: Path = Path("/proc")) -> Pressure:
    try:
        found = _AVERAGE.search((proc / "pressure" / "cpu").read_text())
    except OSError:  # a kernel without pressure stall information
        found = None
    memory = {name: int(kib) for name, kib in _MEMORY.findall((proc / "meminfo").read_text())}
    return Pressure(
        cpu=float(found[1]) / 100 if found else 0.0, free_memory=memory["MemAvailable"] / memory["MemTotal"]
    )


def rest_under(pressure: Pressure) -> Rest:
    """The least that helps: nothing, no CPU time, or the memory of its processes too."""
    if pressure.free_memory < STOP_FREE_MEMORY:
        return Rest.STOP
    if pressure.free_memory < FREEZE_FREE_MEMORY or pressure.cpu > FREEZE_CPU:
        return Rest.FREEZE
    return Rest.KEEP
