"""One node's sandboxes: started ahead of need, handed to their programs, reclaimed at once.

Invariants: a program has at most one sandbox; starts are bounded by `max_starts` and sandboxes by
`max_sandboxes`, in the order in which their programs need them, and no program stands waiting for room
that one prepared for another takes; one that was prepared is handed over only if it lives; `release` takes
a sandbox down whatever it was doing, and is idempotent; one that would not go is tried again until it
has gone, and keeps its image until then; after `stop`, nothing of this session is left. The session
(one life of one host) tells our sandboxes from those of hosts of this machine that have died, which
`start` sweeps away, whatever run they were of. A reaper stands by for the case that this process or the
driver dies, and is replaced if it dies itself. What goes wrong with a sandbox is `SandboxFailed` to its
program, whatever it was (no file descriptor or process to be had, an engine that refuses or is late),
and nothing to anybody else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from thunder_rollout.errors import SandboxFailed, ThunderError
from thunder_rollout.sandbox import cgroups
from thunder_rollout.sandbox.config import BackendChoice, SandboxConfig, select_backend
from thunder_rollout.sandbox.image_store import ImageStore
from thunder_rollout.sandbox.placement import HostStats
from thunder_rollout.sandbox.protocol import ExecResult, HostedSandbox, Rest, Sandbox, SandboxSpec
from thunder_rollout.sandbox.reaper import Reaper, sweep, sweep_leftovers
from thunder_rollout.sandbox.resting import RestingSandboxes
from thunder_rollout.sandbox.session import new_session
from thunder_rollout.sandbox.start_gate import StartGate

logger = logging.getLogger(__name__)

LOST_AFTER_S = 10.0  # without a heartbeat, a driver on another node counts as dead
STOP_AGAIN_S = 5.0  # after a stop that failed
_WATCH_EVERY_S = 2.0
_FIRST = 0.0  # due before everything that is due at some time

MakeSandbox = Callable[[SandboxSpec], HostedSandbox]


@dataclass(slots=True, eq=False)
class _Slot:
    sandbox: HostedSandbox
    image: str
    due_s: float  # when its program is expected to need it
    has_place: bool = False  # among `max_sandboxes`, to be left
    has_image: bool = False  # a lease of it, to be given back
    is_up: bool = False
    is_wanted: bool = False  # its program stands waiting for it, or has it
    is_taken: bool = False
    starting: asyncio.Task[float] = field(init=False)


class SandboxHost:
    """`make` and `images` replace the backend (tests hand in fakes); then nothing is swept and no reaper runs."""

    def __init__(
        self,
        config: SandboxConfig,
        *,
        run: str,
        owner_pid: int | None = None,
        make: MakeSandbox | None = None,
        images: ImageStore | None = None,
    ) -> None:
        self._config = config
        self._run = run
        self._session = new_session()
        self._owner_pid = owner_pid
        self._make = make
        self._choice = BackendChoice(backend="fake", reason="handed in")
        self._images = images
        self._reaper: Reaper | None = None
        self._reaper_watch: asyncio.Task[None] | None = None
        self._starts = StartGate(config.max_starts)
        self._places = StartGate(config.max_sandboxes)
        self._resting = RestingSandboxes(config.when_paused)
        self._rest_watch: asyncio.Task[None] | None = None
        self._slots: dict[str, _Slot] = {}
        self._leaving: set[_Slot] = set()  # those being stopped, whose places are free soon
        self._stops: set[asyncio.Task[None]] = set()
        self._later_stops: set[asyncio.Task[None]] = set()  # of what did not go at once
        self._num_started = 0
        self._num_failed = 0
        self._total_start_s = 0.0
        self._stopped = False

    async def start(self, images: Sequence[str] = ()) -> BackendChoice:
        """Choose the backend, build the toy image if it is one of `images`, remove what dead hosts of this
        machine left. Other images are pulled when they are needed (see `ImageStore`).

        Raises `ConfigError` if no backend can be had, `SandboxFailed` if the toy image can't, or the node or its
        engine is in trouble.
        """
        try:
            await self._set_up(images)
        except OSError as error:
            raise SandboxFailed(f"sandbox: the host of run={self._run} can't start: {error}") from error
        self._rest_watch = asyncio.create_task(self._resting.run(), name="watch-pressure")
        return self._choice

    async def _set_up(self, images: Sequence[str]) -> None:
        if self._make is None:
            self._choice = await asyncio.to_thread(select_backend, self._config)
            logger.info("sandbox backend=%s: %s", self._choice.backend, self._choice.reason)
            await self._sweep_leftovers()
            self._reaper = await asyncio.to_thread(self._start_reaper)
            self._reaper_watch = asyncio.create_task(self._watch_reaper(), name="watch-reaper")
            self._make = await self._backend(images)

    def expect(self, images: Iterable[str]) -> None:
        """The images of the samples to come, in their order: what to pull ahead and whom to evict."""
        if self._images is not None:
            self._images.expect(images)

    def sample_started(self, image: str) -> None:
        if self._images is not None:
            self._images.started(image)

    def sample_finished(self, image: str) -> None:
        if self._images is not None:
            self._images.finished(image)

    async def prepare(self, program: str, spec: SandboxSpec, *, within_s: float = 0.0) -> float:
        """Start the program's sandbox unless it is started already, or wake it; the seconds that took.

        `within_s` from now it is needed: where starts queue, the most urgent goes first. Raises
        `SandboxFailed`. Cancelling the call leaves the sandbox to the program.
        """
        return await self._ready(program, self._slot(program, spec, time.monotonic() + within_s))

    async def _ready(self, program: str, slot: _Slot) -> float:
        await asyncio.wait([slot.starting])
        if slot.starting.cancelled():
            raise SandboxFailed(f"sandbox: program={program} was released while its sandbox started")
        took_s = slot.starting.result()
        with _typed(program):
            woke_s = await self._resting.wake(program)
        return took_s if woke_s is None else woke_s

    async def acquire(self, program: str, spec: SandboxSpec) -> float:
        """Wait for the program's sandbox, starting it if nobody prepared it or the one prepared has died; as
        `prepare`."""
        took_s = await self._wanted(program, spec)
        slot = self._slots.get(program)
        if slot is not None and not slot.is_taken and not await self._is_alive(program, slot):
            logger.warning("program=%s: the sandbox prepared for it has died; starting another", program)
            if self._slots.get(program) is slot:
                await self.release(program)
            took_s = await self._wanted(program, spec)
            slot = self._slots.get(program)
        if slot is not None:
            slot.is_taken = True
        return took_s

    async def rest(self, program: str) -> bool:
        """The program waits for the model: its sandbox takes up less until the next call, `prepare` or `wake`.

        Whether it was put away, and takes about as long to have back as to start. Nothing happens if the program
        has none yet, or one prepared for a grant that is near."""
        if self._rest_watch is not None and self._rest_watch.done() and not self._rest_watch.cancelled():
            self._rest_watch.result()  # it ends before the host only by a bug of ours
        slot = self._slots.get(program)
        if slot is None or not slot.is_taken:
            return False
        with _typed(program):
            return await self._resting.rest(program, slot.sandbox) is Rest.STOP

    async def wake(self, program: str) -> None:
        """The program will need its sandbox soon. Raises `SandboxFailed`."""
        with _typed(program):
            await self._resting.wake(program)

    async def exec(self, program: str, command: str, *, timeout_s: float) -> ExecResult:
        with _typed(program):
            return await self._of(program).exec(command, timeout_s=timeout_s)

    async def read_file(self, program: str, path: str) -> bytes:
        with _typed(program, answer=FileNotFoundError):
            return await self._of(program).read_file(path)

    async def write_file(self, program: str, path: str, content: bytes) -> None:
        with _typed(program, answer=FileNotFoundError):
            await self._of(program).write_file(path, content)

    async def diff(self, program: str, base_commit: str) -> bytes:
        with _typed(program):
            return await self._of(program).diff(base_commit)

    async def clear(self, program: str) -> None:
        with _typed(program):
            await self._of(program).clear()

    async def release(self, program: str) -> None:
        """Remove the program's sandbox, also while it starts. Idempotent, bounded in time; what does not go at once
        is seen to later."""
        self._resting.forget(program)
        slot = self._slots.pop(program, None)
        if slot is not None:
            await asyncio.shield(self._retire(program, slot))

    @asynccontextmanager
    async def fresh(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        """A started sandbox of nobody's, for grading; removed at the end of the block."""
        program = f"fresh-{uuid.uuid4().hex}"
        try:
            await self.acquire(program, spec)
            yield self._of(program)
        finally:
            await self.release(program)

    def stats(self) -> HostStats:
        num_starting = sum(not slot.starting.done() for slot in self._slots.values())
        return HostStats(
            num_starting=num_starting,
            num_running=len(self._slots) - num_starting,
            num_started=self._num_started,
            num_failed=self._num_failed,
            mean_start_s=self._total_start_s / max(1, self._num_started),
            max_starts=self._config.max_starts,
            max_sandboxes=self._config.max_sandboxes,
            num_cpus=os.cpu_count() or 1,
            images=tuple(self._images.present()) if self._images else (),
            mean_pull_s=self._images.stats().mean_pull_s if self._images else 0.0,  # nothing to pull
            free_disk_bytes=self._images.free_disk_bytes() if self._images else None,
        )

    async def stop(self) -> None:
        """Remove every sandbox of this session. Idempotent; the host can't be used again."""
        self._stopped = True
        await asyncio.gather(*(self.release(program) for program in list(self._slots)))
        await asyncio.gather(*self._stops)
        for task in self._later_stops:  # the sweep takes these
            task.cancel()
        await asyncio.gather(*self._later_stops, return_exceptions=True)
        if self._images is not None:
            await self._images.stop()
        watches = [watch for watch in (self._rest_watch, self._reaper_watch) if watch is not None]
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        reaper, self._reaper = self._reaper, None
        if reaper is not None and await self._sweep_own():
            reaper.stop()

    def heartbeat(self) -> None:
        """To be called every few seconds on behalf of a driver on another node."""
        if self._reaper is not None:
            self._reaper.beat()

    def _slot(self, program: str, spec: SandboxSpec, due_s: float) -> _Slot:
        """The program's, made now if it has none; due then, if not sooner."""
        slot = self._slots.get(program)
        if slot is None:
            slot = self._slots[program] = self._new_slot(program, spec, due_s)
        slot.due_s = min(slot.due_s, due_s)
        self._starts.hasten(slot, slot.due_s)
        self._places.hasten(slot, slot.due_s)
        return slot

    async def _wanted(self, program: str, spec: SandboxSpec) -> float:
        slot = self._slot(program, spec, time.monotonic())
        slot.is_wanted = True
        self._places.hasten(slot, _FIRST)
        self._make_places()
        return await self._ready(program, slot)

    def _make_places(self) -> None:
        """For programs that stand waiting, as many prepared sandboxes go, those needed last first, as there are no
        places free or being left. Their programs start others, and nothing is lost."""
        num_waiting = sum(slot.is_wanted and not slot.has_place for slot in self._slots.values())
        num_short = num_waiting - self._places.num_free - len(self._leaving)
        idle = [(slot.due_s, name) for name, slot in self._slots.items() if slot.is_up and not slot.is_wanted]
        for _, program in sorted(idle, reverse=True)[: max(0, num_short)]:
            self._retire(program, self._slots.pop(program))

    async def _take_place(self, slot: _Slot) -> None:
        """Raises `SandboxFailed` after a time in which every sandbox there is has ended."""
        try:
            async with asyncio.timeout(self._config.limits.ttl_s):
                await self._places.enter(slot, _FIRST if slot.is_wanted else slot.due_s)
        except TimeoutError as error:
            raise SandboxFailed(
                f"sandbox: none of the {self._config.max_sandboxes} on its node ended; raise sandbox.max_sandboxes"
            ) from error
        slot.has_place = True

    def _new_slot(self, program: str, spec: SandboxSpec, due_s: float) -> _Slot:
        if self._make is None or self._stopped:
            raise SandboxFailed(f"sandbox: the host of run={self._run} is not running")
        labels = {"run": self._run, "session": self._session, "program": program}
        sandbox = self._make(dataclasses.replace(spec, labels=spec.labels | labels))
        slot = _Slot(sandbox, spec.image, due_s)
        slot.starting = asyncio.create_task(self._start(program, slot), name=f"start-sandbox-{program}")
        slot.starting.add_done_callback(_retrieve)
        return slot

    async def _is_alive(self, program: str, slot: _Slot) -> bool:
        with _typed(program):
            return await slot.sandbox.is_alive()

    async def _start(self, program: str, slot: _Slot) -> float:
        try:
            with _typed(program):
                await self._take_place(slot)
                if self._images is not None:
                    await self._images.acquire(slot.image)
                    slot.has_image = True
                async with self._starts.inside(slot, slot.due_s):  # not before: a pull must not keep others out
                    began_s = time.monotonic()
                    await slot.sandbox.start()
        except Exception:
            self._num_failed += 1
            if self._slots.get(program) is slot:  # so that the program's next attempt starts anew
                del self._slots[program]
            self._retire(program, slot)
            raise
        took_s = time.monotonic() - began_s
        self._num_started += 1
        self._total_start_s += took_s
        slot.is_up = True
        self._make_places()
        return took_s

    def _retire(self, program: str, slot: _Slot) -> asyncio.Task[None]:
        """Take down a sandbox that is no program's any more; the first try."""
        stopping = asyncio.create_task(self._take_down(program, slot), name=f"stop-sandbox-{program}")
        self._stops.add(stopping)
        stopping.add_done_callback(self._stops.discard)
        if slot.has_place:
            self._leaving.add(slot)
        return stopping

    async def _take_down(self, program: str, slot: _Slot) -> None:
        slot.starting.cancel()
        await asyncio.wait([slot.starting])
        has_gone = await self._has_gone(program, slot)
        self._leaving.discard(slot)
        if not has_gone:
            self._make_places()
            later = asyncio.create_task(self._take_down_later(program, slot), name=f"stop-sandbox-again-{program}")
            self._later_stops.add(later)
            later.add_done_callback(self._later_stops.discard)

    async def _take_down_later(self, program: str, slot: _Slot) -> None:
        has_gone = False
        while not has_gone:
            await asyncio.sleep(STOP_AGAIN_S)
            has_gone = await self._has_gone(program, slot)

    async def _has_gone(self, program: str, slot: _Slot) -> bool:
        try:
            with _typed(program):
                await slot.sandbox.stop()
        except SandboxFailed as error:
            logger.warning("program=%s: its sandbox stays, the next try in %.0f s: %s", program, STOP_AGAIN_S, error)
            return False
        if self._images is not None and slot.has_image:
            self._images.release(slot.image)
        if slot.has_place:
            self._places.leave()
        return True

    def _of(self, program: str) -> Sandbox:
        slot = self._slots.get(program)
        if slot is None or not slot.starting.done():
            raise SandboxFailed(f"sandbox: program={program} has none that is ready; acquire it first")
        self._resting.forget(program)
        return slot.sandbox

    def _engine(self) -> dict[str, Any]:
        return {"backend": self._choice.backend, "docker_host": self._config.docker_host}

    async def _sweep_leftovers(self) -> None:
        try:
            num_swept = await asyncio.to_thread(sweep_leftovers, **self._engine())
        except (SandboxFailed, OSError) as error:
            logger.warning("run=%s: something that hosts left which died stays: %s", self._run, error)
        else:
            if num_swept:
                logger.info("run=%s: removed %d leftovers of hosts that died", self._run, num_swept)

    async def _sweep_own(self) -> bool:
        """Whether nothing is left of this session; if not, the reaper goes on once this process has ended."""
        own = self._session
        try:
            await asyncio.to_thread(sweep, self._run, is_ours=lambda session: session == own, **self._engine())
        except (ThunderError, OSError) as error:
            logger.warning("run=%s: some of its sandboxes are left to the reaper: %s", self._run, error)
            return False
        return True

    def _start_reaper(self) -> Reaper:
        return Reaper(
            run=self._run,
            session=self._session,
            pids=[os.getpid(), *([self._owner_pid] if self._owner_pid else [])],
            lost_after_s=None if self._owner_pid else LOST_AFTER_S,
            **self._engine(),
        )

    async def _watch_reaper(self) -> None:
        while self._reaper is not None:
            await asyncio.sleep(_WATCH_EVERY_S)
            if not self._reaper.is_running():
                logger.warning("run=%s: the reaper is gone; starting another", self._run)
                self._reaper.stop()
                try:
                    self._reaper = await asyncio.to_thread(self._start_reaper)
                except (SandboxFailed, OSError) as error:
                    logger.warning("run=%s: no reaper can be started now: %s", self._run, error)

    async def _backend(self, images: Sequence[str]) -> MakeSandbox:
        start_timeout_s = self._config.start_timeout_s
        if self._choice.backend == "local":
            cgroups.weigh(cgroups.PARENT, self._config.cpu_shares)
            from thunder_rollout.sandbox.local import LocalSandbox

            return lambda spec: LocalSandbox(spec, start_timeout_s=start_timeout_s)
        from thunder_rollout.sandbox.docker import DockerSandbox
        from thunder_rollout.sandbox.docker_engine import DockerEngine
        from thunder_rollout.sandbox.docker_images import DockerImageEngine
        from thunder_rollout.sandbox.images import TOY_IMAGE

        engine = DockerEngine(self._config.docker_host)
        await asyncio.to_thread(engine.weigh, self._config.cpu_shares)
        num_cpus = await asyncio.to_thread(lambda: engine.num_cpus)
        if (cpus := self._config.limits.cpus) > num_cpus:
            logger.warning(
                "sandbox.limits.cpus=%g: the engine at %s has %d, and its sandboxes get as many",
                cpus, engine.address, num_cpus,
            )  # fmt: skip
        image_engine = await asyncio.to_thread(DockerImageEngine, engine, self._config.images.docker_config)
        store = self._images = ImageStore(image_engine, self._config.images)
        await store.start()
        if TOY_IMAGE in images:
            async with store.lease(TOY_IMAGE):
                pass  # it is built by now
        return lambda spec: DockerSandbox(spec, engine, images=store, start_timeout_s=start_timeout_s)


@contextmanager
def _typed(program: str, *, answer: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    """An error of the machine's or the engine's (`docker.errors.APIError` and `TimeoutError` are `OSError`s too) leaves
    as `SandboxFailed`; `answer` is none of them."""
    try:
        yield
    except answer:
        raise
    except OSError as error:
        raise SandboxFailed(f"sandbox: program={program}: {type(error).__name__}: {error}") from error


def _retrieve(task: asyncio.Task[float]) -> None:
    """A failure belongs to whoever waits for the sandbox; it may be that nobody does any more."""
    if not task.cancelled():
        task.exception()
