"""The Docker image of toy tasks: Debian, Python 3 with pytest, and git. Nothing else.

`ensure_toy_image` makes it once per engine. No registry is needed where debootstrap is
installed and we are root: the image is then built from the host's own package mirror. Elsewhere
it is built from a public Python image, which takes a registry that answers.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thunder_rollout.errors import SandboxFailed

if TYPE_CHECKING:
    import docker

logger = logging.getLogger(__name__)

TOY_IMAGE = "thunder-toy:1"
_PACKAGES = "python3,python3-pytest,git"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DOCKERFILE = b"""FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir pytest
"""
_BUILD_TIMEOUT_S = 900.0
_DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True, slots=True, kw_only=True)
class AptSource:
    """A Debian archive and the release to take from it, as the host itself uses them."""

    uri: str
    suite: str


def ensure_toy_image(client: docker.DockerClient, tag: str = TOY_IMAGE) -> str:
    """Return `tag`, building the image first if the engine has none. Blocking; minutes at first.

    Raises `SandboxFailed` with the remedy when it can be built in neither way.
    """
    from docker.errors import ImageNotFound

    try:
        client.images.get(tag)
        return tag
    except ImageNotFound:
        pass
    began_s = time.monotonic()
    source = host_apt_source()
    if os.geteuid() == 0 and shutil.which("debootstrap") and source is not None:
        logger.info("image=%s: building from %s packages (a minute or two, once)", tag, source.suite)
        _import_debootstrap(client, tag, source)
    else:
        logger.info("image=%s: building from the public Python image (once)", tag)
        _build_from_registry(client, tag)
    size_mb = client.images.get(tag).attrs["Size"] / 1e6
    logger.info("image=%s: ready, %.0f MB, took %.0f s", tag, size_mb, time.monotonic() - began_s)
    return tag


def host_apt_source(apt: Path = Path("/etc/apt"), os_release: Path = Path("/etc/os-release")) -> AptSource | None:
    """The host's own main Debian or Ubuntu archive; None where it isn't such a host."""
    match = re.search(r"^VERSION_CODENAME=\"?(\w+)", _text(os_release), re.MULTILINE)
    if match is None:
        return None
    suite = match[1]
    for listing in [apt / "sources.list", *sorted(apt.glob("sources.list.d/*"))]:
        for stanza in _text(listing).split("\n\n"):
            fields = dict(re.findall(r"^(\w[\w-]*):[ \t]*(.+)$", stanza, re.MULTILINE))
            if suite in fields.get("Suites", "").split() and "URIs" in fields:
                return AptSource(uri=fields["URIs"].split()[0], suite=suite)
        one_line = re.search(rf"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+{suite}\s", _text(listing), re.MULTILINE)
        if one_line:
            return AptSource(uri=one_line[1], suite=suite)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _import_debootstrap(client: docker.DockerClient, tag: str, source: AptSource) -> None:
    with tempfile.TemporaryDirectory(prefix="thunder-image-", dir="/var/tmp") as folder:
        root = Path(folder) / "root"
        keyring = [f"--keyring={_DEBIAN_KEYRING}"] if _DEBIAN_KEYRING.exists() else []
        _run(
            ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", *keyring, source.suite, root, source.uri],
            log=Path(folder) / "log",
        )
        for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
            shutil.rmtree(root / waste, ignore_errors=True)
        (root / "usr/bin/python").symlink_to("python3")
        (root / "etc/apt/sources.list").write_text("")
        archive = Path(folder) / "root.tar"
        _run(["tar", "--numeric-owner", "--sort=name", "-cf", archive, "-C", root, "."], log=Path(folder) / "log")
        repository, _, version = tag.partition(":")
        client.api.import_image_from_file(
            str(archive), repository=repository, tag=version or "latest", changes=[f"ENV PATH={_PATH}", 'CMD ["bash"]']
        )


def _run(argv: list[str | Path], *, log: Path) -> None:
    with log.open("ab") as sink:
        done = subprocess.run(argv, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, timeout=_BUILD_TIMEOUT_S)
    if done.returncode != 0:
        tail = log.read_text(errors="replace")[-800:]
        raise SandboxFailed(
            f"image: {argv[0]} failed with exit code {done.returncode}; check the host's package mirror in "
            f"/etc/apt, or use sandbox.backend=local, which needs no image. It said: {tail}"
        )


def _build_from_registry(client: docker.DockerClient, tag: str) -> None:
    from docker.errors import APIError, BuildError

    try:
        client.images.build(fileobj=io.BytesIO(_DOCKERFILE), tag=tag, rm=True, forcerm=True)
    except (APIError, BuildError) as error:
        raise SandboxFailed(
            f"image: {tag} can't be built from a registry ({error}). Install debootstrap and run as root to build it "
            "without one, or use sandbox.backend=local, which needs no image"
        ) from error
