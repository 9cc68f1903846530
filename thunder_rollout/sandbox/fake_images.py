"""A Docker engine's images without an engine: a disk that counts its bytes, and a registry in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from thunder_rollout.sandbox.image_cache import Image
from thunder_rollout.sandbox.image_engine import FoundImage, ImageInUse, PullFailed, PullProgress


class FakeImageEngine:
    """`ImageEngine`. `disk` is what is there; `peak_bytes` the most it ever took, as an engine takes
    it: all new layers compressed, then unpacked one by one.

    `pull_s` is how long a pull takes. `failures` are raised by the next pulls, in their order.
    Images in `held` can't be removed, those in `local` have no registry.
    """

    def __init__(self, registry: Iterable[Image], *, pull_s: float = 0.0, failures: Iterable[PullFailed] = ()) -> None:
        self.registry: Mapping[str, Image] = {image.name: image for image in registry}
        self.disk: dict[str, Image] = {}
        self.held: set[str] = set()
        self.local: set[str] = set()
        self.failures = list(failures)
        self.pulls: list[str] = []
        self.pulled_bytes = 0
        self.peak_bytes = 0
        self.max_pulling = 0
        self._pull_s = pull_s
        self._packed_bytes: dict[str, int] = {}
        self._unpacking: dict[str, int] = {}  # layers by key
        self._lock = threading.Lock()

    def found(self) -> list[FoundImage]:
        return [FoundImage(image=image, fixed=name in self.local) for name, image in list(self.disk.items())]

    def find(self, name: str) -> FoundImage | None:
        image = self.disk.get(name)
        return FoundImage(image=image, fixed=name in self.local) if image else None

    def describe(self, name: str) -> Image:
        if name not in self.registry:
            raise PullFailed(f"image: no registry has {name}", transient=False)
        return self.registry[name]

    def pull(self, name: str, on_progress: Callable[[PullProgress], None]) -> None:
        with self._lock:
            self.pulls.append(name)
            if self.failures:
                raise self.failures.pop(0)
            image = self.describe(name)
            have = {layer.key for there in self.disk.values() for layer in there.layers} | self._unpacking.keys()
            new = [layer for layer in image.layers if layer.key not in have]
            self._packed_bytes[name] = sum(layer.pull_bytes for layer in new)
            self._unpacking |= {layer.key: 0 for layer in new}
            self.pulled_bytes += self._packed_bytes[name]
            self.max_pulling = max(self.max_pulling, len(self._packed_bytes))
            self._measure()
        progress = PullProgress(total_bytes=self._packed_bytes[name], pulled_bytes=self._packed_bytes[name])
        time.sleep(self._pull_s)
        on_progress(progress)
        with self._lock:
            for layer in new:
                self._unpacking[layer.key] = layer.disk_bytes
                self._measure()
                self._packed_bytes[name] -= layer.pull_bytes
            del self._packed_bytes[name]
            self.disk[name] = image
            for layer in new:
                self._unpacking.pop(layer.key, None)
            self._measure()

    def remove(self, name: str) -> None:
        with self._lock:
            if name in self.held:
                raise ImageInUse(f"a container uses {name}")
            self.disk.pop(name, None)

    def free_disk_bytes(self) -> int | None:
        return None

    def _measure(self) -> None:
        layers = {layer.key: layer.disk_bytes for image in self.disk.values() for layer in image.layers}
        taken_bytes = sum((self._unpacking | layers).values()) + sum(self._packed_bytes.values())
        self.peak_bytes = max(self.peak_bytes, taken_bytes)
