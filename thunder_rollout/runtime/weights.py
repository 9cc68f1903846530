"""Weight updates of a running rollout: gate shut, engines updated, gate open.

Contract: no request is lost; when an update is over, however it ended, every gate it shut is open
again; an engine that (re)starts gets the current weights before it is announced (`Weights.load_into`).
Updates and starts take turns, so an engine that comes up during an update comes up with its weights.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from thunder_rollout.core.events import Event, WeightsUpdated, WeightsUpdating
from thunder_rollout.engine.protocol import EngineStats
from thunder_rollout.engine.weights import FolderWeights, UpdateMode, WeightSource
from thunder_rollout.errors import EngineDied

logger = logging.getLogger(__name__)


class EventPort(Protocol):
    async def post(self, event: Event) -> None: ...


class WeightsTaker(Protocol):
    """The part of an `Engine` that matters here."""

    async def stats(self) -> EngineStats: ...

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """`duration_s` from the first gate shut to the last one open; the engines of `died` are out of it, and
    have to start anew."""

    version: str
    duration_s: float
    died: tuple[str, ...]


async def update_weights(
    scheduler: EventPort,
    engines: Mapping[str, WeightsTaker],
    source: WeightSource,
    *,
    version: str,
    mode: UpdateMode = UpdateMode.KEEP,
    batch: int | None = None,
) -> UpdateReport:
    """Bring every engine of `engines` (by backend name, all of them announced) to the weights `source`,
    called `version`; `batch` of them at a time, all at once where None.

    Raises `WeightsRefused` if they are not this model's. An engine that dies is left to whoever watches it.
    """
    started_s = asyncio.get_running_loop().time()
    died: list[str] = []
    for names in _batches(list(engines), batch):
        async with _gate(scheduler, names, version):
            calls = (engines[name].update_weights(source, version=version, mode=mode) for name in names)
            results = await asyncio.gather(*calls, return_exceptions=True)
            died += [name for name, result in zip(names, results, strict=True) if isinstance(result, EngineDied)]
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, EngineDied):
                    raise result
    return UpdateReport(
        version=version, duration_s=asyncio.get_running_loop().time() - started_s, died=tuple(sorted(died))
    )


@asynccontextmanager
async def _gate(scheduler: EventPort, names: tuple[str, ...], version: str) -> AsyncIterator[None]:
    """Shut around an update; opened also where it failed, and then as no new version."""
    await scheduler.post(WeightsUpdating(backends=names))
    served: str | None = None
    try:
        yield
        served = version
    finally:
        await asyncio.shield(scheduler.post(WeightsUpdated(backends=names, version=served)))


def _batches(names: list[str], size: int | None) -> list[tuple[str, ...]]:
    return [tuple(names[start : start + (size or len(names))]) for start in range(0, len(names), size or len(names))]


class Weights:
    """The weights a run serves now, and the engines that serve them. One per run, in the driver."""

    def __init__(self, *, mode: UpdateMode, batch: int | None) -> None:
        self.version: str | None = None  # None: those that the engines start with
        self._engines: dict[str, WeightsTaker] = {}  # those that were announced
        self._source: Any = None  # a WeightSource, as the engines take it
        self._mode = mode
        self._batch = batch
        self._turn = asyncio.Lock()

    def start_with(self, source: WeightSource, *, version: str) -> None:
        """Engines that are yet to be announced get these."""
        self.version, self._source = version, source

    async def update(self, scheduler: EventPort, source: WeightSource, *, version: str) -> UpdateReport:
        """As the function `update_weights`, of all engines, and remembered for those that start later."""
        async with self._turn:
            report = await update_weights(
                scheduler, self._engines, source, version=version, mode=self._mode, batch=self._batch
            )
            self.version, self._source = version, source
        logger.info("weights %s serve after %.2f s", version, report.duration_s)
        return report

    @asynccontextmanager
    async def load_into(self, name: str, engine: WeightsTaker) -> AsyncIterator[None]:
        """Load the current weights into a started engine that nobody knows of yet; announce it inside, and
        it takes part in what comes. An engine that left for good may stay: it counts as died."""
        async with self._turn:
            if self.version is not None and (await engine.stats()).weight_version != self.version:
                await engine.update_weights(self._source, version=self.version, mode=UpdateMode.CUT)
            yield
            self._engines[name] = engine


class WeightsFolder:
    """A folder in which a trainer leaves checkpoints, a folder each.

    A checkpoint is complete when it is there: write it under a name that begins with a dot, or on the
    same file system elsewhere, and rename it. Its name is its version. The newest by time of change
    counts; older ones that nobody loaded are passed over.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).expanduser()
        self._seen: str | None = None

    def newest(self) -> tuple[FolderWeights, str] | None:
        """A checkpoint that was not returned before, with its version."""
        if not self._folder.is_dir():
            return None
        there = [path for path in self._folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        path = max(there, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)
        if path is None or path.name == self._seen:
            return None
        self._seen = path.name
        return FolderWeights(path=str(path.resolve())), path.name
