"""Settings of the sandboxes of a run, and the choice of where they run."""

from __future__ import annotations

from dataclasses import dataclass, field

from thunder_rollout.errors import ConfigError
from thunder_rollout.sandbox.protocol import SandboxLimits

BACKENDS = ("auto", "docker", "local")
WHEN_PAUSED = ("auto", "keep", "freeze", "stop")


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"sandbox.{name}={value!r}: must be {rule}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    """Of one node. `docker_config` is where private registries' credentials lie, so that none is in ours."""

    # Of all images on the engine's disk, with room to unpack them and with sandboxes put away; None: no limit.
    budget_bytes: int | None = None
    max_pulls: int = 2  # at the same time
    prefetch: int = 2  # of so many tasks to come the images are pulled ahead
    pull_attempts: int = 5
    retry_s: float = 1.0  # before the second attempt at a pull; twice as long before each further one
    docker_config: str | None = None  # as `docker login` writes it; None: the docker command's own

    def __post_init__(self) -> None:
        budget_bytes = self.budget_bytes
        _require(budget_bytes is None or budget_bytes > 0, "images.budget_bytes", budget_bytes, "> 0, or null")
        _require(1 <= self.max_pulls <= 8, "images.max_pulls", self.max_pulls, "1 to 8")
        _require(self.prefetch >= 0, "images.prefetch", self.prefetch, ">= 0")
        _require(self.pull_attempts >= 1, "images.pull_attempts", self.pull_attempts, ">= 1")
        _require(self.retry_s > 0, "images.retry_s", self.retry_s, "> 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """`auto` is `docker` where an engine answers, else `local`."""

    backend: str = "auto"
    limits: SandboxLimits = field(default_factory=SandboxLimits)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    network: str = "none"  # the only choice: an agent with a network can read the answer
    docker_host: str | None = None  # None: DOCKER_HOST, else the default socket
    cpu_shares: int = 1024  # of all sandboxes of a node together; 1024: as much as one busy thread of anybody else
    when_paused: str = "auto"  # what becomes of a sandbox whose program waits; auto: by the node's pressure
    max_starts: int = 4  # sandboxes of one node that start at the same time
    max_sandboxes: int | None = None  # of one node, at work or at rest; further ones wait. None: no limit
    start_timeout_s: float = 120.0  # of one sandbox, its setup included

    def __post_init__(self) -> None:
        limits = self.limits
        _require(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")
        _require(self.network == "none", "network", self.network, "none")
        _require(2 <= self.cpu_shares <= 262_144, "cpu_shares", self.cpu_shares, "2 to 262144")
        _require(self.when_paused in WHEN_PAUSED, "when_paused", self.when_paused, f"one of {', '.join(WHEN_PAUSED)}")
        _require(self.max_starts >= 1, "max_starts", self.max_starts, ">= 1")
        max_sandboxes = self.max_sandboxes
        _require(max_sandboxes is None or max_sandboxes >= 1, "max_sandboxes", max_sandboxes, ">= 1, or null")
        _require(self.start_timeout_s > 0, "start_timeout_s", self.start_timeout_s, "> 0")
        _require(limits.memory_bytes >= 64 * 2**20, "limits.memory_bytes", limits.memory_bytes, ">= 67108864 (64 MiB)")
        _require(limits.cpus >= 0.01, "limits.cpus", limits.cpus, ">= 0.01")
        _require(limits.pids >= 16, "limits.pids", limits.pids, ">= 16")
        _require(limits.disk_bytes >= 2**20, "limits.disk_bytes", limits.disk_bytes, ">= 1048576 (1 MiB)")
        _require(limits.output_bytes >= 64, "limits.output_bytes", limits.output_bytes, ">= 64")
        _require(limits.ttl_s > 0, "limits.ttl_s", limits.ttl_s, "> 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """`backend` is docker or local; `reason` says why, for the user."""

    backend: str
    reason: str


def select_backend(config: SandboxConfig) -> BackendChoice:
    """Decide where sandboxes run. Blocking: it asks the Docker engine.

    Raises `ConfigError` if the backend asked for can't be had here.
    """
    from thunder_rollout.sandbox.docker_engine import probe_engine
    from thunder_rollout.sandbox.local import local_unavailable

    if config.backend == "local":
        refusal = local_unavailable()
        if refusal is None:
            return BackendChoice(backend="local", reason="sandbox.backend=local")
        raise ConfigError(f"sandbox.backend=local: {refusal}")
    probe = probe_engine(config.docker_host)
    if probe.version is not None:
        return BackendChoice(backend="docker", reason=f"Docker engine {probe.version} answers at {probe.address}")
    if config.backend == "docker":
        raise ConfigError(
            f"sandbox.backend=docker: no Docker engine answers at {probe.address} ({probe.error}); start it, point "
            "sandbox.docker_host or DOCKER_HOST at it, or use sandbox.backend=local"
        )
    refusal = local_unavailable()
    if refusal is not None:
        raise ConfigError(
            f"sandbox.backend=auto: no Docker engine answers at {probe.address} ({probe.error}) and local sandboxes "
            f"can't run either: {refusal}"
        )
    return BackendChoice(backend="local", reason=f"no Docker engine answers at {probe.address}")
