"""`ProgramRouter`: the Ray actor class that verl makes in place of its load balancer.

An `ActorClass` by itself, since verl makes one of a plain class with Ray's default of 1,000 calls at a
time: with 1,000 requests held no release would run. Requests are held in one concurrency group, releases
run in another, the rest in Ray's default one. Each group has a thread and an event loop of its own, so
all of them hand their work to one loop, where the router lives.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError

from thunder_rollout.errors import EngineDied
from thunder_rollout.remote import remote_call
from thunder_rollout.verl_adapter.router.config import RouterConfig, parse
from thunder_rollout.verl_adapter.router.replica import ReplicaFacts, ReplicaState, read_facts, read_state
from thunder_rollout.verl_adapter.router.router import Router
from thunder_rollout.verl_adapter.versions import require_tested_verl

T = TypeVar("T")

MAX_HELD = 100_000
MAX_RELEASES = 10_000
INSPECT_TIMEOUT_S = 300.0


class RayReplica:
    """`ReplicaPort` on the handle of verl's server actor."""

    def __init__(self, name: str, handle: Any, config: RouterConfig) -> None:
        self.handle = handle
        self._what = f"replica {name}"
        self._config = config

    async def facts(self) -> ReplicaFacts:
        try:
            facts: ReplicaFacts = await self._read(read_facts, self._config.capacity_tokens, self._config.block_size)
        except EngineDied as error:
            if isinstance(error.__cause__, ActorUnavailableError):
                raise TimeoutError(str(error)) from error
            raise
        return facts

    async def state(self) -> ReplicaState:
        """One that can't be reached for now is as good as paused."""
        try:
            state: ReplicaState = await self._read(read_state)
        except EngineDied as error:
            if not isinstance(error.__cause__, ActorUnavailableError):
                raise
            return ReplicaState(paused=True, prompt_lengths=None)
        return state

    async def _read(self, function: Any, *args: Any) -> Any:
        return await remote_call(
            self.handle.__ray_call__.remote(function, *args), died=EngineDied, what=f"verl's {self._what}"
        )


@ray.remote(num_cpus=0, concurrency_groups={"acquire": MAX_HELD, "release": MAX_RELEASES})
class ProgramRouter:
    """verl's `RequestLoadBalancer` over `Router`; adds nothing to it."""

    def __init__(self, servers: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Raises `UnsupportedVerl`, and `ConfigError` for a bad file or replicas that can't be scheduled."""
        require_tested_verl()
        self._config = parse(config)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="router", daemon=True).start()
        self._router = Router(self._ports(servers), self._config)
        asyncio.run_coroutine_threadsafe(self._router.inspect(), self._loop).result(INSPECT_TIMEOUT_S)

    @ray.method(concurrency_group="acquire")
    async def acquire_server(
        self, request_id: str, prompt_ids: Any, sampling_params: Mapping[str, Any] | None = None
    ) -> tuple[str, Any]:
        name, port = await self._run(self._router.acquire(request_id, list(prompt_ids), sampling_params))
        return name, port.handle

    @ray.method(concurrency_group="release")
    async def release_server(self, server_id: str, request_id: str | None = None) -> None:
        await self._call(self._router.release, server_id, request_id or "")

    @ray.method(concurrency_group="release")
    async def tool_started(self, request_id: str, tool: str) -> None:
        await self._run(self._router.tool_started(request_id, tool))

    @ray.method(concurrency_group="release")
    async def program_ended(self, request_id: str) -> None:
        await self._run(self._router.program_ended(request_id))

    async def require_acquire_fields(self) -> list[str]:
        return ["prompt_ids", "sampling_params"]

    async def require_release_fields(self) -> list[str]:
        return ["request_id"]

    async def add_servers(self, servers: Mapping[str, Any]) -> None:
        await self._run(self._router.add_servers(self._ports(servers)))

    async def remove_servers(self, server_ids: list[str]) -> None:
        await self._call(self._router.remove_servers, server_ids)

    async def get_all_servers(self) -> list[str]:
        return await self._call(self._router.servers)

    async def lost_servers(self) -> dict[str, str]:
        return await self._call(self._router.lost_servers)

    async def get_inflight_count(self, server_id: str) -> int:
        return await self._call(self._router.inflight, server_id)

    async def get_total_inflight(self) -> int:
        return await self._call(self._router.total_inflight)

    async def get_status(self) -> dict[str, Any]:
        return await self._call(self._router.status)

    async def clear_sticky_cache(self) -> dict[str, Any]:
        return await self._call(self._router.clear_sticky_cache)

    async def metrics(self) -> dict[str, float]:
        """Named `thunder/router/...`, for verl's logger; counts and seconds since the last call."""
        return await self._call(self._router.metrics)

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        async def call() -> T:
            return function(*args)

        return await self._run(call())

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _ports(self, servers: Mapping[str, Any]) -> dict[str, RayReplica]:
        return {name: RayReplica(name, handle, self._config) for name, handle in servers.items()}


def _wait_for_its_start(create: Callable[..., Any]) -> Callable[..., Any]:
    """verl does not look whether its router came up: a run that is refused would fail every sample instead, in the
    async modes without end. `create` is the class's `remote`, which then raises `RayActorError` with the reason."""

    def remote(*args: Any, **kwargs: Any) -> Any:
        router = create(*args, **kwargs)
        ray.get(router.__ray_ready__.remote())
        return router

    return remote


ProgramRouter.remote = _wait_for_its_start(ProgramRouter.remote)  # type: ignore[attr-defined]
