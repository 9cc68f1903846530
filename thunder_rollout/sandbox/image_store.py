"""A node's images: pulled when a sandbox needs them and a little before, evicted within the budget.

`ImageCache` decides; this carries it out on an `ImageEngine`. Invariants: an image is on the node
for as long as somebody holds a lease of it; the budget holds at every moment (as far as sizes are
known); at most `max_pulls` pulls at a time; who asks for room first gets it first, so that small
images never starve a big one; a pull ahead of need begins only where a slot and room are free.
Cancelling a lease leaves the pull to whoever needs it next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.config import ImagesConfig
from thunder_rollout.sandbox.image_cache import Image, ImageCache, disk_bytes
from thunder_rollout.sandbox.image_engine import ImageEngine, ImageInUse, PullFailed, PullProgress, canonical_name

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStats:
    num_pulls: int
    num_evictions: int
    pulled_bytes: int  # compressed, as the registry sent them
    held_bytes: int
    wait_s: float  # what leases waited for, in all
    mean_pull_s: float | None  # None: nothing was pulled yet


class ImageStore:
    """All methods run on one event loop. `start` first, `stop` last."""

    def __init__(self, engine: ImageEngine, config: ImagesConfig) -> None:
        self._engine = engine
        self._config = config
        self._cache = ImageCache(config.budget_bytes)
        self._threads = ThreadPoolExecutor(config.max_pulls + 4, thread_name_prefix="images")
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._removals: dict[str, asyncio.Future[None]] = {}
        self._described: dict[str, Image] = {}  # by their registry
        self._failed_ahead: set[str] = set()
        self._slots = asyncio.Semaphore(config.max_pulls)
        self._room = asyncio.Lock()  # first come, first served
        self._change = asyncio.Event()  # replaced each time it is set
        self._ahead: asyncio.Task[None] | None = None
        self._stopping = False
        self._num_pulls = self._num_evictions = self._pulled_bytes = 0
        self._wait_s = 0.0
        self._pulling_s = 0.0

    async def start(self) -> None:
        """Learn what is there, and evict what is over the budget already."""
        for found in await self._call(self._engine.found):
            self._cache.add(found.image, fixed=found.fixed)
        async with self._room:
            await self._evict(self._cache.plan_trim())
        self._ahead = asyncio.create_task(self._pull_ahead(), name="pull images ahead")

    async def stop(self) -> None:
        """End pulls under way. Idempotent; images stay."""
        self._stopping = True
        tasks = [*self._pulls.values(), *([self._ahead] if self._ahead else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def expect(self, order: Iterable[str]) -> None:
        """The images of the samples to come, in their order."""
        self._cache.expect(canonical_name(name) for name in order)
        self._changed()

    def started(self, name: str) -> None:
        """A sample begins: its use of the image is no longer to come, but not over before `finished`."""
        self._cache.started(canonical_name(name))
        self._changed()

    def finished(self, name: str) -> None:
        self._cache.finished(canonical_name(name))
        self._changed()

    async def acquire(self, name: str) -> None:
        """Have the image on the node until `release`. Raises `SandboxFailed`."""
        name = canonical_name(name)
        began_s = time.monotonic()
        self._cache.pin(name)
        try:
            await self._have(name)
        except BaseException:
            self._unpin(name)
            raise
        self._wait_s += time.monotonic() - began_s

    def release(self, name: str) -> None:
        self._unpin(canonical_name(name))

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[None]:
        await self.acquire(name)
        try:
            yield
        finally:
            self.release(name)

    async def keep(self, content_bytes: int) -> int | None:
        """Room for the files of a sandbox that is put away: what it takes until `give_back`. None if there is none
        now; this waits for nobody, and goes before nobody who waits for room."""
        try:
            async with asyncio.timeout(0):
                await self._room.acquire()
        except TimeoutError:
            return None
        try:
            num_bytes = disk_bytes(content_bytes)
            plan = self._cache.plan_keep(num_bytes)
            if plan is None or not await self._evict(plan):
                return None
            self._cache.keep(num_bytes)
            return num_bytes
        finally:
            self._room.release()

    def give_back(self, num_bytes: int) -> None:
        self._cache.give_back(num_bytes)
        self._changed()

    def present(self) -> list[str]:
        return self._cache.present()

    def stats(self) -> ImageStats:
        return ImageStats(
            num_pulls=self._num_pulls,
            num_evictions=self._num_evictions,
            pulled_bytes=self._pulled_bytes,
            held_bytes=self._cache.held_bytes,
            wait_s=self._wait_s,
            mean_pull_s=self._pulling_s / self._num_pulls if self._num_pulls else None,
        )

    def free_disk_bytes(self) -> int | None:
        return self._engine.free_disk_bytes()

    def _unpin(self, name: str) -> None:
        self._cache.unpin(name)
        self._changed()

    async def _have(self, name: str) -> None:
        if self._ahead is not None and self._ahead.done() and not self._ahead.cancelled():
            self._ahead.result()  # it ends by itself only by a bug of ours
        while (removal := self._removals.get(name)) is not None:
            await asyncio.wait([removal])
        if name not in self._pulls:
            found = await self._call(lambda: self._engine.find(name))  # others build and remove images, too
            if found is not None:
                self._cache.add(found.image, fixed=found.fixed)
            else:
                self._cache.remove(name)
        while not self._cache.is_present(name):
            pull = self._pulls.get(name) or self._spawn(name, ahead=False)
            await asyncio.wait([pull])
            if pull.cancelled():
                raise SandboxFailed(f"image: {name} was being pulled when its host stopped")
            pull.result()

    def _spawn(self, name: str, *, ahead: bool) -> asyncio.Task[None]:
        pull = asyncio.create_task(self._pull(name, ahead), name=f"pull {name}")
        self._pulls[name] = pull

        def ended(task: asyncio.Task[None]) -> None:
            del self._pulls[name]
            self._changed()
            # An error belongs to whoever waits; it may be that nobody does.
            if not task.cancelled() and (error := task.exception()) is not None and ahead:
                self._failed_ahead.add(name)
                logger.warning("image=%s: can't be pulled ahead: %s", name, error)

        pull.add_done_callback(ended)
        return pull

    async def _pull(self, name: str, ahead: bool) -> None:
        """The image is there afterwards; if pulled `ahead`, only where that costs no sooner need."""
        async with self._slots:
            await self._describe(name)
            async with self._room:
                if not await self._make_room(name, ahead):
                    return
                self._cache.begin_pull(name)
            await self._fetch(name)

    async def _describe(self, name: str) -> None:
        if self._config.budget_bytes is None:
            self._cache.describe(Image(name=name, layers=()))
            return
        if name not in self._described:
            self._described[name] = await self._retried(lambda: self._engine.describe(name), name)
        self._cache.describe(self._described[name])

    async def _make_room(self, name: str, ahead: bool) -> bool:
        while True:
            change = self._change
            plan = self._cache.plan_pull(name, ahead=ahead)
            if plan is None and (excess_bytes := self._cache.excess_bytes(name)) > 0:
                raise SandboxFailed(
                    f"sandbox.images.budget_bytes={self._config.budget_bytes}: image {name} needs {excess_bytes} bytes "
                    "more to be pulled and unpacked; raise the budget, or remove images of yours from the engine"
                )
            if plan is not None and await self._evict(plan):
                return True
            if ahead:
                return False
            if plan is None:
                await change.wait()

    async def _fetch(self, name: str) -> None:
        """Pull an image whose room is taken."""
        began_s = time.monotonic()
        try:
            fetched_bytes = await self._retried(lambda: self._fetch_blocking(name), name)
            found = await self._call(lambda: self._engine.find(name))
            if found is None:
                raise SandboxFailed(f"image: {name} was removed from the engine right after it was pulled")
            self._cache.add(found.image, fixed=found.fixed)
        finally:
            self._cache.abandon_pull(name)
            self._changed()
        self._num_pulls += 1
        self._pulling_s += time.monotonic() - began_s
        self._pulled_bytes += fetched_bytes
        logger.info("image=%s: pulled %.0f MB in %.1f s", name, fetched_bytes / 1e6, time.monotonic() - began_s)

    def _fetch_blocking(self, name: str) -> int:
        logged_s = time.monotonic()
        last = PullProgress()

        def on_progress(progress: PullProgress) -> None:
            nonlocal logged_s, last
            last = progress
            if self._stopping:
                raise SandboxFailed(f"image: {name} was being pulled when its host stopped")
            if time.monotonic() - logged_s >= _LOG_EVERY_S:
                logged_s = time.monotonic()
                done, total = progress.pulled_bytes / 1e6, progress.total_bytes / 1e6
                logger.info("image=%s: %.0f of %.0f MB pulled", name, done, total)

        self._engine.pull(name, on_progress)
        return last.pulled_bytes

    async def _evict(self, names: Iterable[str]) -> bool:
        """False if one of them is needed after all: then the plan is void."""
        for name in names:
            if not self._cache.may_go(name):
                return False
            self._cache.remove(name)
            removal = self._removals[name] = asyncio.ensure_future(self._remove(name))
            try:
                await asyncio.shield(removal)
            finally:
                del self._removals[name]
            if self._cache.is_present(name):
                return False
            self._num_evictions += 1
            logger.info("image=%s: evicted", name)
        return True

    async def _remove(self, name: str) -> None:
        try:
            await self._call(lambda: self._engine.remove(name))
        except ImageInUse as error:
            logger.warning("image=%s stays: %s", name, error)
            found = await self._call(lambda: self._engine.find(name))
            if found is not None:
                self._cache.add(found.image, fixed=True)

    async def _pull_ahead(self) -> None:
        """Pull what the next samples need, where a slot and room are free. Until cancelled."""
        while True:
            change = self._change
            for name in self._cache.upcoming(self._config.prefetch):
                if self._cache.is_present(name) or name in self._pulls or name in self._failed_ahead:
                    continue
                if len(self._pulls) >= self._config.max_pulls:
                    break
                if self._cache.knows(name) and self._cache.plan_pull(name, ahead=True) is None:
                    break
                self._spawn(name, ahead=True)
            await change.wait()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def _retried(self, function: Callable[[], T], name: str) -> T:
        wait_s = self._config.retry_s
        for attempt in range(1, self._config.pull_attempts):
            try:
                return await self._call(function)
            except PullFailed as error:
                if not error.transient:
                    raise
                logger.warning("image=%s: attempt %d failed, the next in %.0f s: %s", name, attempt, wait_s, error)
            await asyncio.sleep(wait_s)
            wait_s *= 2
        return await self._call(function)

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)
