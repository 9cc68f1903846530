"""Weight updates of a running rollout: gate shut, engines updated, gate open.

Contract: no request is lost; when an update is over, however it ended, every gate it shut is open
again; an engine that (re)starts gets the current weights before it is announced (`Weights.load_into`).
Updates and starts take turns, so an engine that comes up during an update comes up with its weights.
Weights are taken by all engines or by none: each is asked before the first loads them, and one that
refuses what others have loaded by then is killed, to start anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from thunder_rollout.core.events import INITIAL_VERSION, Event, WeightsUpdated, WeightsUpdating
from thunder_rollout.engine.protocol import EngineStats
from thunder_rollout.engine.weights import FolderWeights, UpdateMode, WeightSource
from thunder_rollout.errors import EngineDied, WeightsRefused

logger = logging.getLogger(__name__)


class EventPort(Protocol):
    async def post(self, event: Event) -> None: ...


class WeightsTaker(Protocol):
    """The part of an `Engine` that matters here."""

    async def stats(self) -> EngineStats: ...

    async def check_weights(self, source: WeightSource) -> None: ...

    async def update_weights(self, source: WeightSource, *, version: str, mode: UpdateMode) -> None: ...

    def kill(self) -> None:
        """End it; whoever watches it starts it again."""


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

    Raises `WeightsRefused` if one of them can't take them; all serve the old ones then. An engine that dies is
    left to whoever watches it.
    """
    started_s = asyncio.get_running_loop().time()
    _check_version(version)
    checks = (engine.check_weights(source) for engine in engines.values())
    _raise_unless(EngineDied, await asyncio.gather(*checks, return_exceptions=True))
    died: list[str] = []
    has_served = False
    for names in _batches(list(engines), batch):
        async with _gate(scheduler, names, version):
            calls = (engines[name].update_weights(source, version=version, mode=mode) for name in names)
            results = await asyncio.gather(*calls, return_exceptions=True)
            has_served = has_served or None in results
            _raise_unless((EngineDied, WeightsRefused) if has_served else EngineDied, results)
            for name, result in zip(names, results, strict=True):
                if isinstance(result, WeightsRefused):
                    logger.warning("backend=%s refuses what others serve, and is killed: %s", name, result)
                    engines[name].kill()
            died += [name for name, result in zip(names, results, strict=True) if result is not None]
    return UpdateReport(
        version=version, duration_s=asyncio.get_running_loop().time() - started_s, died=tuple(sorted(died))
    )


def _check_version(version: str) -> None:
    if version == INITIAL_VERSION:
        raise WeightsRefused(
            f"weights version={version!r}: that is how the weights are called that engines start with; give these "
            "another version (of a checkpoint in rollout.weights_folder: its folder another name)"
        )


def _raise_unless(expected: type[Exception] | tuple[type[Exception], ...], results: Iterable[object]) -> None:
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, expected):
            raise result


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
        """Engines that are yet to be announced get these. Raises `WeightsRefused` for the version that engines
        have without them."""
        _check_version(version)
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
    counts; older ones that nobody loaded are passed over. One that is removed meanwhile was never there, but
    keep the newest: engines that start load it.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).expanduser()
        self._passed: set[str] = set()  # returned, or older when another was
        self._last = (0, "")

    def newest(self) -> tuple[FolderWeights, str] | None:
        """A checkpoint newer than all that were returned before, with its version; who writes into an old one, or
        removes it file by file, makes it no newer."""
        there = set(self._there())
        last = max((one for one in there if one[1] not in self._passed), default=self._last)
        if last <= self._last:
            return None
        self._last = last
        self._passed.update(name for _, name in there)
        _, name = last
        return FolderWeights(path=str((self._folder / name).resolve())), name

    def _there(self) -> Iterator[tuple[int, str]]:
        """When each was changed, and its name."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for name in os.listdir(self._folder):
                with contextlib.suppress(FileNotFoundError):
                    status = (self._folder / name).stat()
                    if stat.S_ISDIR(status.st_mode) and not name.startswith("."):
                        yield status.st_mtime_ns, name
