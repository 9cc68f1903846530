"""Control groups of local sandboxes: hard limits on memory, processes and CPU for a whole sandbox.

They take root, and cgroup v1 with the controllers mounted or v2 with the root's `subtree_control`
writable. Where neither is there, `create` returns None and the caller falls back on rlimits.
All are named `thunder/<run>/<session>-<sandbox>`, so that `sweep` finds what a dead run left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thunder_rollout.sandbox.protocol import SandboxLimits

logger = logging.getLogger(__name__)

PARENT = "thunder"
DOCKER_PARENT = "thunder-docker"
EVEN_SHARES = 1024
_EVEN_WEIGHT = 100  # what v2 calls as much
_CPU_PERIOD_US = 100_000
_CONTROLLERS = ("memory", "pids", "cpu")
_FREEZER = "freezer"  # of v1; first, for nothing that is frozen can be removed


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    folders: tuple[Path, ...]  # one with v2, one a controller with v1

    def procs_files(self) -> list[str]:
        """Writing a process id to each puts the process under the limits."""
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def freeze(self) -> bool:
        """Begin to stop all processes inside; False where there is no freezer."""
        return any(_set_frozen(folder, frozen=True) for folder in self.folders)

    def is_frozen(self) -> bool:
        return any(_is_frozen(folder) for folder in self.folders)

    def thaw(self) -> None:
        """Idempotent."""
        for folder in self.folders:
            _set_frozen(folder, frozen=False)

    def remove(self) -> bool:
        """Kill what is inside and remove the groups; False if processes are still dying."""
        removed = [_remove(folder) for folder in self.folders]
        return all(removed)


def create(run: str, name: str, limits: SandboxLimits, root: Path = Path("/sys/fs/cgroup")) -> Cgroup | None:
    if os.geteuid() != 0:
        return None
    cgroup = Cgroup(folders=tuple(base / PARENT / safe_name(run) / safe_name(name) for base in _hierarchies(root)))
    if not cgroup.folders:
        return None
    try:
        for folder in cgroup.folders:
            _make(folder, v2=_is_v2(root))
        _limit(cgroup.folders, limits, v2=_is_v2(root))
    except OSError as error:
        logger.warning("no cgroup for sandbox=%s, rlimits stand in: %s", name, error)
        cgroup.remove()
        return None
    return cgroup


def weigh(parent: str, cpu_shares: int, root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Give all groups under `parent` together so many CPU shares; a group that nobody weighed has `EVEN_SHARES`.
    False where that can't be done here."""
    bases = [base for base in _hierarchies(root) if _is_v2(root) or base.name == "cpu"] if os.geteuid() == 0 else []
    try:
        for base in bases:
            (base / parent).mkdir(exist_ok=True)
            if _is_v2(root):
                (base / "cgroup.subtree_control").write_text("+cpu")
                (base / parent / "cpu.weight").write_text(str(max(1, round(cpu_shares * _EVEN_WEIGHT / EVEN_SHARES))))
            else:
                (base / parent / "cpu.shares").write_text(str(cpu_shares))
    except OSError as error:
        logger.warning("the sandboxes' share of the CPU can't be set: %s", error)
        return False
    return bool(bases)


def sweep(run: str | None, is_ours: Callable[[str], bool], root: Path = Path("/sys/fs/cgroup")) -> int:
    """Kill and remove the groups of `run` (None: of any) whose session `is_ours` accepts; how many sandboxes had
    one. Blocking, bounded."""
    names: set[str] = set()
    for base in _hierarchies(root):
        for top in (base / PARENT).glob(f"{safe_name(run) if run else '*'}/"):
            for folder in top.glob("*/"):
                if is_ours(folder.name.partition("-")[0]):
                    names.add(folder.name)
                    _remove_patiently(folder)
            with contextlib.suppress(OSError):  # another session's groups are still in it
                top.rmdir()
    return len(names)


def safe_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)[:80] or "_"


def _is_v2(root: Path) -> bool:
    return (root / "cgroup.controllers").exists()


def _hierarchies(root: Path) -> list[Path]:
    if _is_v2(root):
        return [root]
    return [root / name for name in (_FREEZER, *_CONTROLLERS) if (root / name / "cgroup.procs").exists()]


def _make(folder: Path, *, v2: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if v2:
        for parent in (folder.parents[2], folder.parents[1], folder.parents[0]):
            (parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in _CONTROLLERS))


def _limit(folders: tuple[Path, ...], limits: SandboxLimits, *, v2: bool) -> None:
    quota_us = max(1000, int(limits.cpus * _CPU_PERIOD_US))
    for folder in folders:
        if v2:
            (folder / "memory.max").write_text(str(limits.memory_bytes))
            (folder / "pids.max").write_text(str(limits.pids))
            (folder / "cpu.max").write_text(f"{quota_us} {_CPU_PERIOD_US}")
            swap = folder / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
        elif (folder / "memory.limit_in_bytes").exists():
            (folder / "memory.limit_in_bytes").write_text(str(limits.memory_bytes))
            swap = folder / "memory.memsw.limit_in_bytes"
            if swap.exists():
                swap.write_text(str(limits.memory_bytes))
        elif (folder / "pids.max").exists():
            (folder / "pids.max").write_text(str(limits.pids))
        elif (folder / "cpu.cfs_quota_us").exists():
            (folder / "cpu.cfs_period_us").write_text(str(_CPU_PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(quota_us))


def _remove(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    with contextlib.suppress(OSError):
        _set_frozen(folder, frozen=False)  # v1: a frozen process dies when it is thawed
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _set_frozen(folder: Path, *, frozen: bool) -> bool:
    """False if the folder has no freezer."""
    for name, value in (("freezer.state", "FROZEN" if frozen else "THAWED"), ("cgroup.freeze", str(int(frozen)))):
        if (folder / name).exists():
            (folder / name).write_text(value)
            return True
    return False


def _is_frozen(folder: Path) -> bool:
    v1, v2 = folder / "freezer.state", folder / "cgroup.events"
    if v1.exists():
        return v1.read_text().strip() == "FROZEN"
    return v2.exists() and "frozen 1" in v2.read_text()


def _remove_patiently(folder: Path, patience_s: float = 3.0) -> None:
    deadline_s = time.monotonic() + patience_s
    while not _remove(folder) and time.monotonic() < deadline_s:
        time.sleep(0.02)
