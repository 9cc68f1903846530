"""What an image weighs before it is pulled, asked of its registry (the Docker Registry HTTP API V2).

A manifest tells each layer's compressed size, its configuration which layers lie under which. The
unpacked size stands in the last four bytes of a gzip file (modulo 4 GiB); for a layer where it
can't be had, `UNPACK_RATIO` times the compressed size is assumed. Credentials come from Docker's
own configuration file, so that they are in no configuration of ours and in no run folder.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from typing import Any

import docker.auth
import requests

from thunder_rollout.errors import ConfigError
from thunder_rollout.sandbox.image_cache import Image, Layer, disk_bytes, layer_keys
from thunder_rollout.sandbox.image_engine import ImageName, PullFailed, parse_name

UNPACK_RATIO = 4  # unpacked to compressed, where nothing tells: above what images of source code reach
_TIMEOUT_S = 30.0
_GIB4 = 2**32
_HUB = "registry-1.docker.io"
_INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


def registry_of(name: ImageName) -> str:
    return str(docker.auth.resolve_repository_name(name.repository)[0])


def _path_of(name: ImageName) -> str:
    path = str(docker.auth.resolve_repository_name(name.repository)[1])
    return f"library/{path}" if registry_of(name) == docker.auth.INDEX_NAME and "/" not in path else path


class Credentials:
    """Of private registries, from a Docker `config.json` (with its credential helpers)."""

    def __init__(self, path: str | None) -> None:
        """None: the file that the docker command uses. Raises `ConfigError` if it can't be read."""
        try:
            if path is not None:
                with open(path):
                    pass
            self._auths = docker.auth.load_config(path)
        except (OSError, ValueError, docker.errors.DockerException) as error:
            raise ConfigError(
                f"sandbox.images.docker_config={path!r}: can't be read ({type(error).__name__}); name a config.json "
                "as `docker login` writes it"
            ) from None

    def of(self, registry: str) -> dict[str, str]:
        """What `docker pull` sends to it; {} for a registry that asks nobody."""
        return dict(self._auths.resolve_authconfig(registry) or {})


class Registry:
    """Blocking. `architecture` and `insecure` (registries without TLS) are the engine's."""

    def __init__(self, credentials: Credentials, *, architecture: str, insecure: frozenset[str] = frozenset()) -> None:
        self._credentials = credentials
        self._architecture = architecture
        self._insecure = insecure
        self._unpacked_bytes: dict[str, int] = {}  # by digest: images share layers

    def describe(self, name: str) -> Image:
        """Raises `PullFailed`."""
        parts = parse_name(name)
        registry = registry_of(parts)
        with _Session(parts, self._credentials.of(registry), self._base(registry)) as session:
            manifest = session.json(f"manifests/{parts.reference}", accept=_MANIFEST_TYPES + _INDEX_TYPES)
            if "manifests" in manifest:
                manifest = session.json(f"manifests/{self._ours(name, manifest)}", accept=_MANIFEST_TYPES)
            if "config" not in manifest:
                raise PullFailed(f"image: {name} has a manifest of an old form; push it again", transient=False)
            config = session.json(f"blobs/{manifest['config']['digest']}")
            for layer in manifest["layers"]:
                if layer["digest"] not in self._unpacked_bytes:
                    self._unpacked_bytes[layer["digest"]] = session.unpacked_bytes(layer)
        keys = layer_keys(config["rootfs"]["diff_ids"])
        layers = [
            Layer(key=key, pull_bytes=layer["size"], disk_bytes=disk_bytes(self._unpacked_bytes[layer["digest"]]))
            for key, layer in zip(keys, manifest["layers"], strict=True)
        ]
        return Image(name=name, layers=tuple(layers))

    def _ours(self, name: str, index: dict[str, Any]) -> str:
        for entry in index["manifests"]:
            platform = entry.get("platform", {})
            if platform.get("os") == "linux" and platform.get("architecture") == self._architecture:
                return str(entry["digest"])
        raise PullFailed(
            f"image: {name} is not to be had for linux/{self._architecture}; build it for this architecture",
            transient=False,
        )

    def _base(self, registry: str) -> str:
        if registry == docker.auth.INDEX_NAME:
            return f"https://{_HUB}"
        return f"{'http' if registry in self._insecure or _is_loopback(registry) else 'https'}://{registry}"


class _Session:
    """Requests on one repository, with what it takes to be let in."""

    def __init__(self, name: ImageName, login: dict[str, str], base: str) -> None:
        self._path = _path_of(name)
        self._what = f"{registry_of(name)}/{self._path}:{name.reference}"
        self._url = f"{base}/v2/{self._path}"
        self._login = (login.get("username") or login.get("Username"), login.get("password") or login.get("Password"))
        self._http = requests.Session()
        self._http.trust_env = not _is_loopback(registry_of(name))  # a proxy has no way to our loopback
        self._authorization = ""

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def json(self, path: str, accept: tuple[str, ...] = ("*/*",)) -> dict[str, Any]:
        response = self._get(path, {"Accept": ", ".join(accept)})
        try:
            content: dict[str, Any] = response.json()
        except ValueError as error:
            raise PullFailed(f"image: {self._what}: the registry's answer is no JSON", transient=True) from error
        return content

    def unpacked_bytes(self, layer: dict[str, Any]) -> int:
        packed: int = layer["size"]
        if "gzip" not in layer["mediaType"]:
            return packed * (UNPACK_RATIO if "+" in layer["mediaType"] else 1)
        trailer = self._get(f"blobs/{layer['digest']}", {"Range": f"bytes={packed - 4}-{packed - 1}"}, stream=True)
        with trailer:
            if trailer.status_code != requests.codes.partial_content or len(trailer.content) != 4:
                return packed * UNPACK_RATIO
            unpacked = int.from_bytes(trailer.content, "little")
        while unpacked < packed * 0.9:  # nothing grows by more than a header when it is packed
            unpacked += _GIB4
        return unpacked

    def _get(self, path: str, headers: dict[str, str], *, stream: bool = False) -> requests.Response:
        try:
            response = self._send(path, headers, stream)
            if response.status_code == requests.codes.unauthorized:
                self._authorize(response.headers.get("WWW-Authenticate", ""))
                response = self._send(path, headers, stream)
        except requests.RequestException as error:
            raise PullFailed(
                f"image: the registry of {self._what} does not answer ({type(error).__name__})", transient=True
            ) from error
        if response.ok:
            return response
        code = response.status_code
        response.close()
        raise PullFailed(
            f"image: the registry answers {code} for {self._what}; correct the task's image name, or log in with "
            "`docker login` (sandbox.images.docker_config names another file)",
            transient=code == requests.codes.too_many_requests or code >= 500,
        )

    def _send(self, path: str, headers: dict[str, str], stream: bool) -> requests.Response:
        if self._authorization:
            headers = headers | {"Authorization": self._authorization}
        return self._http.get(f"{self._url}/{path}", headers=headers, stream=stream, timeout=_TIMEOUT_S)

    def _authorize(self, challenge: str) -> None:
        """Basic, or a token from the server that the registry names."""
        user, password = self._login
        login = (user, password) if user and password else None
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic" and login is not None:
            self._authorization = "Basic " + base64.b64encode(":".join(login).encode()).decode()
        elif scheme.lower() == "bearer":
            fields = dict(_CHALLENGE.findall(rest))
            params = {"service": fields.get("service", ""), "scope": f"repository:{self._path}:pull"}
            answer = self._http.get(fields["realm"], params=params, auth=login, timeout=_TIMEOUT_S)
            if answer.ok:
                token = answer.json()
                self._authorization = f"Bearer {token.get('token') or token['access_token']}"


def _is_loopback(registry: str) -> bool:
    host = registry.rpartition(":")[0] or registry
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
