"""New weights for a running engine: what may be handed over, and the gate between turns and updates.

Weights come in the checkpoint's own names and shapes, as a folder of safetensors files or as tensors. Tensors
cross process borders in buckets of bounded size, each a safetensors image, and reach the engine's worker
processes one by one, as a file in shared memory that is freed with the process that wrote it, however that
ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from thunder_rollout.core.events import INITIAL_VERSION
from thunder_rollout.errors import EngineDied, RequestError, WeightsRefused

_DRAIN_POLL_S = 0.02  # a turn may be on its way into the engine while it is cut: it is cut again after this
DEFAULT_BUCKET_BYTES = 2048 * 2**20  # verl's
_TIED = {"lm_head.weight"}  # trainers hand it over also where the model ties it to its embedding


class UpdateMode(StrEnum):
    """What becomes of the turns in flight. An engine cuts them for KEEP and CUT alike; whether what they
    produced is kept is up to who asked for them (`runtime.client`)."""

    WAIT = "wait"  # they finish first
    KEEP = "keep"  # they are cut and go on from their tokens under the new weights
    CUT = "cut"  # they are cut and asked again from their prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderWeights:
    """A folder with `*.safetensors`, readable where the engines run."""

    path: str


class Bucket(Protocol):
    """A part of the weights, kept somewhere."""

    def fetch(self) -> Any:
        """(num_bytes,) uint8: a whole safetensors file. Blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalBucket:
    image: Any

    def fetch(self) -> Any:
        return self.image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryWeights:
    """The tensors of all `buckets`, together a whole checkpoint; `shapes` by their names."""

    shapes: Mapping[str, tuple[int, ...]]
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        keep: Callable[[Any], Bucket] = lambda image: LocalBucket(image=image),
    ) -> MemoryWeights:
        """`tensors` are torch tensors of any device with their checkpoint names, the whole model's. They are
        copied, a bucket of at most `bucket_bytes` at a time, and each is handed to `keep` before the next is
        made; a larger tensor is a bucket of its own."""
        from safetensors.torch import save

        named = tensors.items() if isinstance(tensors, Mapping) else tensors
        shapes: dict[str, tuple[int, ...]] = {}
        buckets: list[Bucket] = []
        for group in _in_groups(named, bucket_bytes):
            host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in group}
            shapes |= {name: tuple(tensor.shape) for name, tensor in host.items()}
            buckets.append(keep(np.frombuffer(save(host), dtype=np.uint8)))
        return cls(shapes=shapes, buckets=tuple(buckets))


WeightSource = FolderWeights | MemoryWeights


def _in_groups(named: Iterable[tuple[str, Any]], most_bytes: int) -> Iterator[list[tuple[str, Any]]]:
    group: list[tuple[str, Any]] = []
    num_bytes = 0
    for name, tensor in named:
        if group and num_bytes + tensor.nbytes > most_bytes:
            yield group
            group, num_bytes = [], 0
        group.append((name, tensor))
        num_bytes += tensor.nbytes
    if group:
        yield group


def files_of(source: WeightSource) -> Iterator[AbstractContextManager[str]]:
    """The source as paths of safetensors files, one after the other; each is there while its context lasts."""
    if isinstance(source, FolderWeights):
        yield from (nullcontext(str(path)) for path in _files_in(source))
    else:
        yield from map(_in_memory, source.buckets)


@contextmanager
def _in_memory(bucket: Bucket) -> Iterator[str]:
    memory = os.memfd_create("thunder-weights")
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(memoryview(bucket.fetch()))
        yield f"/proc/{os.getpid()}/fd/{memory}"
    finally:
        os.close(memory)


def _files_in(source: FolderWeights) -> list[Path]:
    files = sorted(Path(source.path).expanduser().glob("*.safetensors"))
    if not files:
        raise WeightsRefused(f"weights {source.path}: no *.safetensors there; give the folder save_pretrained wrote")
    return files


def tensor_shapes(source: WeightSource) -> Mapping[str, tuple[int, ...]]:
    """Shape of each tensor, by name. Raises `WeightsRefused` if there is none to read."""
    from safetensors import SafetensorError, safe_open

    if isinstance(source, MemoryWeights):
        return source.shapes
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files_in(source):
        try:
            with safe_open(path, framework="np") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise WeightsRefused(f"weights {path}: not a whole safetensors file ({error}); write it again") from error
    return shapes


def check_weights(source: WeightSource, model: str) -> None:
    """Raises `WeightsRefused` unless the source has all tensors of `model` (a folder or a Hugging Face id),
    in their shapes, and no others: what is missing would stay old, what differs would fail half-way."""
    own = Path(model).expanduser()
    if not own.is_dir():
        from huggingface_hub import snapshot_download

        own = Path(snapshot_download(model, local_files_only=True))
    what = f"weights {source.path}" if isinstance(source, FolderWeights) else "weights in memory"
    remedy = "hand over every tensor of the checkpoint that the engine was started with"
    old, new = tensor_shapes(FolderWeights(path=str(own))), tensor_shapes(source)
    for names, how in ((old.keys() - new.keys(), "lacks"), (new.keys() - old.keys() - _TIED, "has an unknown")):
        if names:
            raise WeightsRefused(f"{what}: {how} tensor {min(names)!r}, {len(names)} in all; {remedy}")
    for name, shape in old.items():
        if new[name] != shape:
            raise WeightsRefused(f"{what}: {name} has shape {new[name]}, the model's is {shape}; {remedy}")


class UpdateGate:
    """Turns run, or weights change, never both: so one turn has one weight version.

    A turn that comes during an update waits at the gate, which opens however the update ends.
    """

    def __init__(self) -> None:
        self.version = INITIAL_VERSION
        self.in_flight: set[str] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._turn_over = asyncio.Event()
        self._updates = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def turn(self, request_id: str) -> AsyncIterator[None]:
        """Around one turn; raises `RequestError` where one of this id is inside."""
        while not self._open.is_set():
            await self._open.wait()
        if request_id in self.in_flight:
            raise RequestError(f"request {request_id}: request_id: a turn of this id is still running")
        self.in_flight.add(request_id)
        try:
            yield
        finally:
            self.in_flight.discard(request_id)
            self._turn_over.set()

    async def update(
        self,
        version: str,
        load: Callable[[], Awaitable[None]],
        *,
        cut: Callable[[list[str]], Awaitable[None]] | None,
    ) -> None:
        """Let the turns inside finish (`cut` None) or cut them, then `load`; what it raises is raised, and
        the version stays. Cancelled before `load` began, nothing changes; later, it still ends by itself,
        and the gate opens only then."""
        async with self._updates:
            if self._loading is not None:
                await asyncio.wait([self._loading])  # of an update that was cancelled
            self._open.clear()
            try:
                await self._drain(cut)
            except BaseException:
                self._open.set()
                raise
            self._loading = asyncio.create_task(self._load(version, load), name="load weights")
            self._loading.add_done_callback(_retrieve)
            await asyncio.shield(self._loading)

    async def _drain(self, cut: Callable[[list[str]], Awaitable[None]] | None) -> None:
        while self.in_flight:
            self._turn_over.clear()
            if cut is not None:
                await cut(list(self.in_flight))
            try:
                async with asyncio.timeout(None if cut is None else _DRAIN_POLL_S):
                    await self._turn_over.wait()
            except TimeoutError:
                continue

    async def _load(self, version: str, load: Callable[[], Awaitable[None]]) -> None:
        try:
            await load()
            self.version = version
        finally:
            self._open.set()


def _retrieve(task: asyncio.Task[None]) -> None:
    """Whoever waits hears of the failure; if nobody does any more, the engine's state tells."""
    if not task.cancelled():
        task.exception()


async def pause_in_time(pause: Awaitable[None], *, hang_s: float) -> None:
    """`pause` lets an engine whose turns were cut end its step. One that was cut has no turn that shows whether it
    makes steps, so here it is found: raises `EngineDied` after `hang_s`."""
    try:
        async with asyncio.timeout(hang_s):
            await pause
    except TimeoutError:
        raise EngineDied(f"the engine hangs: it did not pause within {hang_s:g} s") from None


def half_loaded(model: str, version: str, error: BaseException) -> EngineDied:
    """An update that failed half-way: no turn may run on such weights."""
    return EngineDied(f"engine {model}: loading weights {version} failed half-way ({error}); it has to start anew")
