"""A Docker image that holds a repository: the toy image with files in it, committed."""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.images import TOY_IMAGE, ensure_toy_image

if TYPE_CHECKING:
    import docker

logger = logging.getLogger(__name__)


def ensure_package_image(client: docker.DockerClient, tag: str, files: Mapping[str, bytes], setup: str) -> None:
    """Have `tag` on the engine: there already, or the toy image with `files` (absolute path to content)
    after the shell command `setup`. Blocking. Raises `SandboxFailed`."""
    from docker.errors import APIError, BuildError, ImageNotFound

    try:
        client.images.get(tag)
        return
    except ImageNotFound:
        pass
    ensure_toy_image(client)
    logger.info("image=%s: building", tag)
    dockerfile = f"FROM {TOY_IMAGE}\nCOPY root /\nRUN {setup}\n".encode()
    context = _tar({"Dockerfile": dockerfile} | {f"root{path}": content for path, content in files.items()})
    try:
        client.images.build(
            fileobj=io.BytesIO(context), custom_context=True, tag=tag, rm=True, forcerm=True, network_mode="none"
        )
    except (APIError, BuildError) as error:
        raise SandboxFailed(f"image: {tag} can't be built ({error}); use sandbox.backend=local") from error


def _tar(files: Mapping[str, bytes]) -> bytes:
    """Modes as a sandbox's own `files` have them; no times, so that the engine's cache holds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in sorted(files.items()):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755 if content.startswith(b"#!") else 0o644
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
