"""A registry on loopback and images of bytes that don't compress, made without an engine."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import socket
import subprocess
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

_CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
_LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
_START_PATIENCE_S = 15.0


class LoopbackRegistry:
    """`docker-registry` (Debian's package) on a free port of 127.0.0.1, its content in `folder`.

    `htpasswd`: the lines of who may read and write; without, everybody may.
    """

    def __init__(self, folder: Path, htpasswd: str = "") -> None:
        self._folder = folder
        self._htpasswd = htpasswd
        self._log = folder / "registry.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def __enter__(self) -> LoopbackRegistry:
        self._folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "info", "formatter": "json", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self._folder / "content")}},
            "http": {"addr": self.address},
        }
        if self._htpasswd:
            (self._folder / "htpasswd").write_text(self._htpasswd)
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(self._folder / "htpasswd")}}
        (self._folder / "config.yml").write_text(json.dumps(config))
        with self._log.open("ab") as log:
            argv = ["docker-registry", "serve", str(self._folder / "config.yml")]
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline_s = time.monotonic() + _START_PATIENCE_S
        while True:
            try:
                http().get(f"http://{self.address}/v2/", timeout=1)
                return self
            except requests.ConnectionError:
                if time.monotonic() > deadline_s or self._process.poll() is not None:
                    raise RuntimeError(f"docker-registry does not start; see {self._log}") from None
                time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(10)

    def log_size(self) -> int:
        return self._log.stat().st_size

    def sent_bytes(self, since: int) -> int:
        """Bytes of layers and other blobs sent, by the registry's own log from `since` on."""
        total = 0
        with self._log.open("rb") as log:
            log.seek(since)
            for line in log:
                entry = json.loads(line) if line.startswith(b"{") else {}
                if entry.get("http.request.method") == "GET" and "/blobs/" in entry.get("http.request.uri", ""):
                    total += int(entry.get("http.response.written", 0))
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    diff_id: str
    digest: str
    packed: bytes
    unpacked_bytes: int


def make_layer(name: str, num_bytes: int) -> PackedLayer:
    """One file `/data/{name}`, the same bytes whenever it is made."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        entry = tarfile.TarInfo(f"data/{name}")
        entry.size = num_bytes
        archive.addfile(entry, io.BytesIO(random.Random(name).randbytes(num_bytes)))
    content = tar.getvalue()
    packed = gzip.compress(content, compresslevel=0, mtime=0)
    return PackedLayer(diff_id=_digest(content), digest=_digest(packed), packed=packed, unpacked_bytes=len(content))


def push(registry: str, name: str, layers: list[PackedLayer], login: tuple[str, str] | None = None) -> None:
    """Put an image (linux on amd64) of `layers`, from the bottom up, at `registry`/`name`:latest."""
    session = http(login)
    for layer in layers:
        _put_blob(session, f"http://{registry}/v2/{name}", layer.packed, layer.digest)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["none"]},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created_by": "loopback"} for _ in layers],
        }
    ).encode()
    _put_blob(session, f"http://{registry}/v2/{name}", config, _digest(config))
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "config": {"mediaType": _CONFIG_TYPE, "size": len(config), "digest": _digest(config)},
        "layers": [{"mediaType": _LAYER_TYPE, "size": len(x.packed), "digest": x.digest} for x in layers],
    }
    url = f"http://{registry}/v2/{name}/manifests/latest"
    session.put(url, data=json.dumps(manifest), headers={"Content-Type": _MANIFEST_TYPE}).raise_for_status()


def http(login: tuple[str, str] | None = None) -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # no proxy has a way to our loopback
    session.auth = login
    return session


def _put_blob(session: requests.Session, repository: str, content: bytes, digest: str) -> None:
    if session.head(f"{repository}/blobs/{digest}").ok:
        return
    started = session.post(f"{repository}/blobs/uploads/")
    started.raise_for_status()
    location = started.headers["Location"]
    put = session.put(
        location + ("&" if "?" in location else "?") + f"digest={digest}",
        data=content,
        headers={"Content-Type": "application/octet-stream"},
    )
    put.raise_for_status()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
