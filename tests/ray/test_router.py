"""`ProgramRouter` as the actor that verl makes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from tests.support.replica_contract import CAPACITY_TOKENS, check_replica
from tests.support.verl_server import StandInServer
from thunder_rollout.verl_adapter import ProgramRouter
from thunder_rollout.verl_adapter.router.actor import RayReplica
from thunder_rollout.verl_adapter.router.config import RouterConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")

CAPPED = {"policy": "capped", "capped": {"max_programs": 1}, "tick_s": 1.0}
NUM_HELD = 3000  # Ray's default lets an actor run 1,000 calls at a time


@pytest.fixture
def actors() -> Iterator[list[Any]]:
    """Killed at the end."""
    made: list[Any] = []
    yield made
    for actor in made:
        ray.kill(actor)


def make_router(actors: list[Any], *, capacity_tokens: int = 100_000, **config: Any) -> tuple[Any, Any]:
    server = ray.remote(num_cpus=0)(StandInServer).remote(capacity_tokens)
    router = ProgramRouter.remote(
        {"a:1": server}, {"router_class": "thunder_rollout.verl_adapter.ProgramRouter"} | config
    )
    actors += [server, router]
    return router, server


def acquire(router: Any, request_id: str, num_tokens: int = 100) -> Any:
    return router.acquire_server.remote(
        request_id=request_id, prompt_ids=list(range(num_tokens)), sampling_params={"temperature": 1.0}
    )


def wait_until(holds: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_dead(actor: Any) -> bool:
    try:
        ray.get(actor.__ray_ready__.remote())
    except ray.exceptions.ActorUnavailableError:
        return False
    except ray.exceptions.ActorDiedError:
        return True
    return False


def test_thousands_of_held_requests_do_not_hold_the_releases_back(actors: list[Any]) -> None:
    router, server = make_router(actors, scheduler=CAPPED)
    assert ray.get(acquire(router, "first"))[0] == "a:1"
    held = [acquire(router, f"p{number}") for number in range(NUM_HELD)]
    wait_until(lambda: ray.get(router.get_total_inflight.remote()) == NUM_HELD + 1)
    assert ray.get(router.get_status.remote())["held"] == NUM_HELD
    assert ray.get(router.require_release_fields.remote()) == ["request_id"], "the rest is not held back either"
    ray.get(server.set.remote(config=None))  # nothing is read of it any more but its state
    router.release_server.remote(server_id="a:1", request_id="first")
    (done,), _ = ray.wait(held, timeout=30)
    assert ray.get(done)[1] == server
    ray.get(router.remove_servers.remote(["a:1"]))
    for ref in held:
        if ref != done:
            with pytest.raises(RuntimeError, match="No available servers in load balancer"):
                ray.get(ref)
    assert ray.get(router.get_total_inflight.remote()) == 0


async def test_a_replica_on_an_actor_keeps_the_contract_of_replicas(actors: list[Any]) -> None:
    server = ray.remote(num_cpus=0)(StandInServer).remote(CAPACITY_TOKENS)
    port = RayReplica("a:1", server, RouterConfig(router_class="any"))
    await server.set.remote(global_steps=0)

    async def become(
        paused: bool, version: int = 3, prompt_lengths: tuple[int, ...] = (), broken: bool = False
    ) -> None:
        await server.set.remote(_submission_paused=paused, global_steps=version)
        for length in prompt_lengths:
            await server.begin.remote(length)
        await server.__ray_call__.remote(lambda self: setattr(self.engine, "errored", broken))

    def die() -> None:
        ray.kill(server)
        wait_until(lambda: is_dead(server))  # until then it may answer, or be out of reach for now

    await check_replica(port, become, die)


@ray.remote(num_cpus=0)
class Caller:
    async def acquire(self, router: Any, request_id: str) -> str:
        return (await acquire(router, request_id))[0]


def test_a_caller_that_is_killed_while_it_holds_a_turn_gives_it_back(actors: list[Any]) -> None:
    router, server = make_router(actors, scheduler=CAPPED, poll_s=0.1, orphan_s=1.0)
    caller = Caller.remote()
    assert ray.get(caller.acquire.remote(router, "p")) == "a:1"
    name = ray.get(server.begin.remote(100))
    held = acquire(router, "q", 200)
    assert ray.wait([held], timeout=2.0)[0] == [], "the server has it"
    ray.kill(caller)
    ray.get(server.end.remote(name))
    assert ray.get(held, timeout=30)[0] == "a:1"
    assert ray.get(router.metrics.remote())["thunder/router/num_reclaimed_turns"] == 1


def test_a_server_that_dies_is_left_out(actors: list[Any]) -> None:
    router, server = make_router(actors)
    ray.get(acquire(router, "p"))
    ray.kill(server)
    router.release_server.remote(server_id="a:1", request_id="p")
    wait_until(lambda: ray.get(router.get_all_servers.remote()) == [])
    assert list(ray.get(router.lost_servers.remote())) == ["a:1"]
    with pytest.raises(RuntimeError, match="No available servers in load balancer"):
        ray.get(acquire(router, "p"))


def test_what_cannot_be_scheduled_is_refused_at_the_start(actors: list[Any]) -> None:
    server = ray.remote(num_cpus=0)(StandInServer).remote(1000)
    actors.append(server)
    ray.get(server.set.remote(engine=None))
    with pytest.raises(ray.exceptions.RayActorError, match="set capacity_tokens and block_size in the router's YAML"):
        ProgramRouter.remote({"a:1": server}, {"router_class": "any"})
