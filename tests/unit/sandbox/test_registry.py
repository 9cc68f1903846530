"""What a registry is asked and what its answers mean, against one that this file scripts."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from thunder_rollout.errors import ConfigError
from thunder_rollout.sandbox.image_cache import layer_keys
from thunder_rollout.sandbox.image_engine import PullFailed, canonical_name, parse_name
from thunder_rollout.sandbox.registry import UNPACK_RATIO, Credentials, Registry

OCI = "application/vnd.oci.image"
DIFFS = ["sha256:one", "sha256:two", "sha256:three"]


class Server(ThreadingHTTPServer):
    """Answers from `content` (path: JSON or bytes) to whoever has a token for `ali`'s password."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server_port}"
        self.content: dict[str, Any] = {}
        self.status: dict[str, int] = {}
        self.has_ranges = True
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.server.asked.append(path)
        login = "Basic " + base64.b64encode(b"ali:open sesame").decode()
        if path == "/token":
            known = self.headers.get("Authorization") == login and "scope=repository%3Ar%2Fimage%3Apull" in query
            return self._answer(200 if known else 401, json.dumps({"token": "t0ken"}).encode())
        if self.headers.get("Authorization") != "Bearer t0ken":
            challenge = f'Bearer realm="http://{self.server.address}/token",service="s"'
            return self._answer(401, b"", {"WWW-Authenticate": challenge})
        if path in self.server.status:
            return self._answer(self.server.status[path], b"")
        found = self.server.content.get(path.removeprefix("/v2/r/image/"))
        if found is None:
            return self._answer(404, b"")
        content = found if isinstance(found, bytes) else json.dumps(found).encode()
        if "Range" in self.headers and self.server.has_ranges:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            return self._answer(206, content[first : last + 1])
        return self._answer(200, content)

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    """An index of one image for two architectures, with two gzip layers and one of zstd."""
    server = Server()
    gzip = b"x" * 996 + (5000).to_bytes(4, "little")
    layers = [
        {"mediaType": f"{OCI}.layer.v1.tar+gzip", "size": 1000, "digest": "sha256:gzip"},
        {"mediaType": f"{OCI}.layer.v1.tar+zstd", "size": 100, "digest": "sha256:zstd"},
        {"mediaType": f"{OCI}.layer.v1.tar+gzip", "size": 1000, "digest": "sha256:gzip"},
    ]
    platforms = [{"os": "linux", "architecture": "arm64"}, {"os": "linux", "architecture": "amd64"}]
    server.content = {
        "manifests/latest": {
            "manifests": [{"digest": f"sha256:{p['architecture']}", "platform": p} for p in platforms]
        },
        "manifests/sha256:amd64": {"config": {"digest": "sha256:config"}, "layers": layers},
        "blobs/sha256:config": {"rootfs": {"diff_ids": DIFFS}},
        "blobs/sha256:gzip": gzip,
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def registry(server: Server, tmp_path: Path) -> Registry:
    return registry_with(server, tmp_path, "open sesame")


def registry_with(server: Server, tmp_path: Path, password: str) -> Registry:
    auth = base64.b64encode(f"ali:{password}".encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {server.address: {"auth": auth}}}))
    return Registry(Credentials(str(tmp_path / "config.json")), architecture="amd64")


def test_an_image_is_described_from_its_manifest_behind_a_token(server: Server, registry: Registry) -> None:
    image = registry.describe(f"{server.address}/r/image")
    assert [layer.key for layer in image.layers] == layer_keys(DIFFS)
    assert [layer.pull_bytes for layer in image.layers] == [1000, 100, 1000]
    gzip, zstd, _ = (layer.disk_bytes - 65_536 for layer in image.layers)
    assert gzip == int(5000 * 1.15), "the last four bytes of the gzip file say 5000"
    assert zstd == int(100 * UNPACK_RATIO * 1.15)
    assert server.asked.count("/v2/r/image/blobs/sha256:gzip") == 1, "a layer is looked at once"


def test_a_layer_over_4_gib_is_told_by_its_packed_size(server: Server, registry: Registry) -> None:
    server.content["blobs/sha256:gzip"] = b"x" * 996 + (10).to_bytes(4, "little")
    image = registry.describe(f"{server.address}/r/image")
    assert image.layers[0].disk_bytes > 2**32


def test_a_registry_without_ranges_leaves_an_estimate(server: Server, registry: Registry) -> None:
    server.has_ranges = False
    image = registry.describe(f"{server.address}/r/image")
    assert image.layers[0].disk_bytes - 65_536 == int(1000 * UNPACK_RATIO * 1.15)


def test_another_architecture_only_is_an_error(server: Server, registry: Registry) -> None:
    del server.content["manifests/latest"]["manifests"][1]
    with pytest.raises(PullFailed, match="not to be had for linux/amd64"):
        registry.describe(f"{server.address}/r/image")


@pytest.mark.parametrize(("status", "transient"), [(404, False), (403, False), (429, True), (503, True)])
def test_a_refusal_says_whether_to_try_again(server: Server, registry: Registry, status: int, transient: bool) -> None:
    server.status["/v2/r/image/manifests/latest"] = status
    with pytest.raises(PullFailed, match=f"answers {status} for .*docker_config") as caught:
        registry.describe(f"{server.address}/r/image")
    assert caught.value.transient == transient


def test_a_wrong_password_is_refused_and_never_shown(server: Server, tmp_path: Path) -> None:
    with pytest.raises(PullFailed, match="answers 401") as caught:
        registry_with(server, tmp_path, "hunter2").describe(f"{server.address}/r/image")
    assert "hunter2" not in str(caught.value)


def test_credentials_that_can_not_be_read_name_the_field_and_not_the_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auths": {"r": {"auth": "hunter2"}}}')
    with pytest.raises(ConfigError, match=r"sandbox\.images\.docker_config") as caught:
        Credentials(str(tmp_path / "config.json"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("a", "a:latest"),
        ("a:1", "a:1"),
        ("docker.io/library/a:1", "a:1"),
        ("docker.io/u/a", "u/a:latest"),
        ("localhost:5000/u/a", "localhost:5000/u/a:latest"),
        ("u/a@sha256:0", "u/a@sha256:0"),
    ],
)
def test_names_as_an_engine_lists_them(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


def test_a_name_in_its_parts() -> None:
    assert (parse_name("r:1/a").repository, parse_name("r:1/a").reference) == ("r:1/a", "latest")
    assert parse_name("a@sha256:0").reference == "sha256:0"
