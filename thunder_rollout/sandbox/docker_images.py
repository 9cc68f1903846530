"""`ImageEngine` on a Docker engine, through the docker SDK."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from docker.errors import APIError, ImageNotFound

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.docker_engine import DockerEngine
from thunder_rollout.sandbox.image_cache import LAYER_BYTES, Image, Layer, disk_bytes, layer_keys
from thunder_rollout.sandbox.image_engine import (
    FoundImage,
    ImageInUse,
    PullFailed,
    PullProgress,
    canonical_name,
    parse_name,
)
from thunder_rollout.sandbox.images import TOY_IMAGE, ensure_toy_image
from thunder_rollout.sandbox.registry import Credentials, Registry, registry_of

# In an engine's words: another try would end the same way.
_PERMANENT = ("not found", "manifest unknown", "does not exist", "denied", "unauthorized", "authentication required",
              "no basic auth credentials", "invalid reference", "no space left", "no matching manifest",
              "not supported")  # fmt: skip
_FILE_LIST_SHARE = 1.02  # an engine keeps the list of a layer's files beside it


class DockerImageEngine:
    """`ImageEngine` on a Docker engine; the toy image it builds where others are pulled."""

    def __init__(self, engine: DockerEngine, docker_config: str | None = None) -> None:
        """Blocking. Raises `ConfigError` if the credentials in `docker_config` can't be read."""
        self._api = engine.client.api
        self._client = engine.client
        self._on_disk: dict[str, int] = {}  # layers measured, by key
        self._credentials = Credentials(docker_config)
        info = self._api.info()
        self._data = info.get("DockerRootDir") or ""
        indexes: dict[str, dict[str, Any]] = (info.get("RegistryConfig") or {}).get("IndexConfigs") or {}
        # Engines on containerd's store keep an image's compressed layers beside the unpacked ones.
        self._keeps_packed = any("io.containerd.snapshotter" in str(pair) for pair in info.get("DriverStatus") or [])
        self._registry = Registry(
            self._credentials,
            architecture=self._api.version()["Arch"],
            insecure=frozenset(name for name, index in indexes.items() if not index.get("Secure", True)),
        )

    def found(self) -> list[FoundImage]:
        with _answering():
            listed = self._api.images()
        names = [name for entry in listed for name in entry["RepoTags"] or entry["RepoDigests"] or []]
        return [found for name in names if "<none>" not in name and (found := self.find(name)) is not None]

    def find(self, name: str) -> FoundImage | None:
        with _answering():
            try:
                attributes = self._api.inspect_image(name)
                history = self._api.history(name)
            except ImageNotFound:
                return None
        keys = layer_keys(attributes["RootFS"].get("Layers") or [])
        sizes = self._measured(keys, attributes["GraphDriver"]) or _told(history, len(keys))
        layers = [self._layer(key, size, size) for key, size in zip(keys, sizes, strict=False)]
        return FoundImage(image=Image(name=name, layers=tuple(layers)), fixed=not attributes["RepoDigests"])

    def _measured(self, keys: list[str], driver: dict[str, Any]) -> list[int]:
        """What each layer takes where the engine's data are ours to read; [] elsewhere."""
        data = driver.get("Data") or {}
        folders = [
            Path(path) for path in (*reversed((data.get("LowerDir") or "").split(":")), data.get("UpperDir")) if path
        ]
        if len(folders) != len(keys) or not all(os.access(folder, os.R_OK | os.X_OK) for folder in folders):
            return []
        for key, folder in zip(keys, folders, strict=True):
            if key not in self._on_disk:
                self._on_disk[key] = int(blocks_bytes(folder) * _FILE_LIST_SHARE) + LAYER_BYTES
        return [self._on_disk[key] for key in keys]

    def describe(self, name: str) -> Image:
        if name == canonical_name(TOY_IMAGE):
            return Image(name=name, layers=())
        image = self._registry.describe(name)
        layers = [self._layer(layer.key, layer.pull_bytes, layer.disk_bytes) for layer in image.layers]
        return Image(name=name, layers=tuple(layers))

    def pull(self, name: str, on_progress: Callable[[PullProgress], None]) -> None:
        if name == canonical_name(TOY_IMAGE):
            ensure_toy_image(self._client)
            return
        parts, progress = parse_name(name), PullProgress()
        login = self._credentials.of(registry_of(parts))
        try:
            stream = self._api.pull(
                parts.repository, tag=parts.reference, stream=True, decode=True, auth_config=login or None
            )
            for entry in stream:
                if "error" in entry:
                    raise _failure(name, entry["error"])
                progress.note(entry)
                on_progress(progress)
        except APIError as error:
            raise _failure(name, str(error.explanation)) from error
        except requests.RequestException as error:
            raise _failure(name, f"the engine stopped answering: {error}") from error

    def remove(self, name: str) -> None:
        with _answering():
            try:
                self._api.remove_image(name)
            except ImageNotFound:
                return
            except APIError as error:
                if error.status_code != 409:
                    raise
                raise ImageInUse(str(error.explanation)) from error

    def free_disk_bytes(self) -> int | None:
        try:
            return shutil.disk_usage(self._data).free
        except OSError:
            return None

    def _layer(self, key: str, pull_bytes: int, unpacked_bytes: int) -> Layer:
        kept_bytes = pull_bytes if self._keeps_packed else 0
        return Layer(key=key, pull_bytes=pull_bytes, disk_bytes=unpacked_bytes + kept_bytes)


def _told(history: list[dict[str, Any]], num_layers: int) -> list[int]:
    """The layers' sizes as the engine knows them: their files' bytes. Which layers hold nothing it
    doesn't say; they are taken for the upper ones."""
    sizes = [disk_bytes(entry["Size"]) for entry in reversed(history) if entry["Size"]]
    return sizes + [LAYER_BYTES] * (num_layers - len(sizes))


def blocks_bytes(folder: Path) -> int:
    """What a folder and all in it take on the disk; what vanishes meanwhile takes nothing."""
    total = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except requests.RequestException as error:  # the engine's own refusals (APIError) are such, too
        raise SandboxFailed(f"sandbox: the Docker engine can't tell or do it: {error}") from error


def _failure(name: str, message: str) -> PullFailed:
    transient = not any(words in message.lower() for words in _PERMANENT)
    return PullFailed(
        f"image: the Docker engine has no {name!r} and can't pull it ({message}); correct the task's image name, build "
        "or load the image first, or log in to its registry (sandbox.images.docker_config)",
        transient,
    )
