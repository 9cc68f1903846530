"""The seam to a Docker engine's images: what is there and what it weighs, pulls and removals.

`DockerImageEngine` honours it, and `FakeImageEngine`, which has no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from thunder_rollout.errors import SandboxFailed, ThunderError
from thunder_rollout.sandbox.image_cache import Image


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image's name in its parts: `repository` as a Docker engine takes it, `reference` a tag or a digest."""

    repository: str
    reference: str


def parse_name(name: str) -> ImageName:
    repository, at, digest = name.partition("@")
    if at:
        return ImageName(repository, digest)
    repository, colon, tag = name.rpartition(":")
    return ImageName(repository, tag) if colon and "/" not in tag else ImageName(name, "latest")


def canonical_name(name: str) -> str:
    """As a Docker engine lists it."""
    parts = parse_name(name.removeprefix("docker.io/library/").removeprefix("docker.io/"))
    return f"{parts.repository}{'@' if ':' in parts.reference else ':'}{parts.reference}"


class PullFailed(SandboxFailed):
    """`transient`: worth another try."""

    def __init__(self, message: str, transient: bool) -> None:
        super().__init__(message, transient)
        self.transient = transient

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundImage:
    """`fixed`: it came from no registry, so nobody could pull it again."""

    image: Image
    fixed: bool


@dataclass(slots=True, kw_only=True)
class PullProgress:
    """Compressed bytes of one pull so far; layers that are there already don't count."""

    total_bytes: int = 0
    pulled_bytes: int = 0
    _layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    def note(self, entry: dict[str, Any]) -> None:
        """One entry of the engine's stream."""
        detail, layer = entry.get("progressDetail") or {}, entry.get("id", "")
        if entry.get("status") == "Downloading" and "total" in detail:
            self._layers[layer] = (int(detail["current"]), int(detail["total"]))
        elif entry.get("status") in ("Download complete", "Verifying Checksum") and layer in self._layers:
            self._layers[layer] = (self._layers[layer][1], self._layers[layer][1])
        else:
            return
        self.pulled_bytes = sum(current for current, _ in self._layers.values())
        self.total_bytes = sum(total for _, total in self._layers.values())


class ImageInUse(ThunderError):
    """A container that isn't ours, or an image built upon it, holds the image."""


class ImageEngine(Protocol):
    """All methods block and may be called from several threads."""

    def found(self) -> list[FoundImage]:
        """Every image that is there."""

    def find(self, name: str) -> FoundImage | None:
        """The image, if it is there."""

    def describe(self, name: str) -> Image:
        """What an image that isn't there is made of. Raises `PullFailed`."""

    def pull(self, name: str, on_progress: Callable[[PullProgress], None]) -> None:
        """Raises `PullFailed`; what `on_progress` raises ends the pull."""

    def remove(self, name: str) -> None:
        """Idempotent; its layers are off the disk when it returns. Raises `ImageInUse`."""

    def free_disk_bytes(self) -> int | None:
        """Where the engine's data lie; None if they lie on another machine. Takes no time."""
