"""The hub of a job on Ray, with real local sandboxes: shared by whoever asks, and replaced when it dies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import ray

from tests.unit.agent.conftest import byte_tokenizer
from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.agent.loop import AgentLoop, TurnResult, in_one_piece
from thunder_rollout.engine.protocol import Generation, Sampling
from thunder_rollout.errors import EngineDied, SandboxFailed
from thunder_rollout.runtime.episode import Played
from thunder_rollout.sandbox.protocol import SandboxSpec
from thunder_rollout.tasks.toy import generate
from thunder_rollout.verl_adapter.crew import HubStages, Stage
from thunder_rollout.verl_adapter.hub import RemoteHub, find_hub
from thunder_rollout.verl_adapter.settings import SweSettings, read_settings
from thunder_rollout.verl_adapter.watch import RolloutDied, TrainersWatch

pytestmark = pytest.mark.usefixtures("ray_cluster")

TASK = generate(seed=0, count=1, difficulty="easy")[0]
FIX = [f"```bash\ngit apply <<'EOF'\n{TASK.patch}EOF\n```", "```bash\nsubmit\n```"]


class Scripted:
    """A model that says one text after another."""

    def __init__(self, chat: ChatFormat, texts: list[str]) -> None:
        tokenizer = byte_tokenizer()
        self._turns = iter([[*tokenizer.encode(text, add_special_tokens=False), chat.end_id] for text in texts])

    async def turn(self, prompt_ids: list[int], sampling: Sampling) -> TurnResult:
        ids = next(self._turns)
        generation = Generation(
            token_ids=ids, logprobs=[0.0] * len(ids), finish_reason="stop", prompt_tokens=len(prompt_ids),
            cached_tokens=0, queue_s=0.0, prefill_s=0.0, decode_s=0.0,
        )  # fmt: skip
        return in_one_piece(generation, backend="e", queue_s=0.0, engine_s=0.0)

    async def tool_started(self, tool: str) -> None: ...

    async def tool_ended(self) -> None: ...


@pytest.fixture
def settings() -> SweSettings:
    return read_settings({"sandbox": {"backend": "local"}})


@pytest.fixture(autouse=True)
async def one_hub() -> AsyncIterator[None]:
    yield
    if (hub := find_hub()) is not None:
        ray.kill(hub)
        await gone()


async def gone() -> None:
    async with asyncio.timeout(20):
        while find_hub() is not None:  # noqa: ASYNC110  Ray tells nobody
            await asyncio.sleep(0.05)


async def forever(check: Callable[[], None]) -> None:
    async with asyncio.timeout(30):
        while True:
            check()
            await asyncio.sleep(0.1)


async def play(stage: Stage, program: str) -> Played:
    chat = ChatFormat(byte_tokenizer())
    loop = AgentLoop(chat=chat, config=AgentConfig(), sampling=Sampling(max_tokens=1), max_model_len=50_000)

    @contextlib.asynccontextmanager
    async def open_model(spec: SandboxSpec) -> AsyncIterator[Scripted]:
        try:
            yield Scripted(chat, FIX)
        finally:
            await stage.hosts.release(program)

    return await stage.player.play(program, TASK, loop, open_model)


async def test_processes_share_one_hub_and_episodes_are_graded_on_its_hosts(settings: SweSettings) -> None:
    first, second = HubStages(settings), HubStages(settings)
    stages = await asyncio.gather(first.stage(TASK), second.stage(TASK))
    played = await asyncio.gather(*(play(stage, f"p{place}") for place, stage in enumerate(stages)))
    assert [episode.verdict.resolved for episode in played] == [True, True]
    first.failed(SandboxFailed("a test said so"))
    async with asyncio.timeout(60):
        while not (figures := await find_hub().figures.remote())["thunder/failures/all"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # Ray keeps no order
        assert figures["thunder/failures/sandbox_failed"] == 1.0
        while (await find_hub().figures.remote())["thunder/sandboxes"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the graders' go after their verdict


async def test_a_hub_that_died_is_replaced_by_whoever_next_fails(settings: SweSettings) -> None:
    stages = HubStages(settings)
    stage = await stages.stage(TASK)
    ray.kill(find_hub())
    await gone()
    with pytest.raises(SandboxFailed) as caught:
        await play(stage, "before")
    stages.failed(caught.value)
    assert (await play(await stages.stage(TASK), "after")).verdict.resolved


async def test_hosts_that_were_killed_are_started_again_for_the_next_attempt(settings: SweSettings) -> None:
    stages = HubStages(settings)
    stage = await stages.stage(TASK)
    fleet = await find_hub().fleet.remote([])
    for host in fleet.handles.hosts:
        ray.kill(host)
    with pytest.raises(SandboxFailed) as caught:
        await play(stage, "before")
    stages.failed(caught.value)
    assert (await play(await stages.stage(TASK), "after")).verdict.resolved


async def test_a_hub_that_somebody_else_started_anew_hears_what_is_to_come(settings: SweSettings) -> None:
    first = RemoteHub(settings.sandbox)
    ray.kill(find_hub())
    await gone()
    second = RemoteHub(settings.sandbox)
    for hub in (first, second):
        hub.expect(["image"])
        hub.count_failure("sandbox_failed")
    async with asyncio.timeout(20):
        num_failures = 0.0
        while num_failures < 2:
            num_failures += (await find_hub().figures.remote())["thunder/failures/all"]
            await asyncio.sleep(0.05)


@ray.remote(num_cpus=0)
class Worker: ...


@ray.remote(num_cpus=0)
class Router:
    """What the watch asks of a `ProgramRouter`."""

    def __init__(self) -> None:
        self._lost: dict[str, str] = {}

    async def lost_servers(self) -> dict[str, str]:
        return self._lost

    async def lose(self, name: str) -> None:
        self._lost[name] = "its engine core died"


@pytest.mark.parametrize("victim", ["worker", "replica", "router"])
async def test_the_trainer_is_told_what_of_its_rollout_was_killed(victim: str, request: Any) -> None:
    workers, router = {name: Worker.remote() for name in ("a", "b")}, Router.remote()
    watch = TrainersWatch(workers, router, endless=[])
    watch.start()
    request.addfinalizer(watch.stop)
    await asyncio.gather(*(worker.__ray_ready__.remote() for worker in workers.values()), router.lost_servers.remote())
    watch.check()
    match victim:
        case "worker":
            ray.kill(workers["b"])
        case "replica":
            await router.lose.remote("replica0")
        case "router":
            ray.kill(router)
    expected = {"worker": "b is gone", "replica": "rollout replica replica0: its engine core died"}
    with pytest.raises(RolloutDied, match=expected.get(victim, "the router is gone")):
        await forever(watch.check)


async def test_samples_that_begin_before_the_hub_is_known_are_told_of_nevertheless(settings: SweSettings) -> None:
    """In their order: those of the first batch begin together, before anybody needs a sandbox."""
    told: list[str] = []

    class Hub:
        def sample_started(self, image: str) -> None:
            told.append(f"started {image}")

        def sample_finished(self, image: str) -> None:
            told.append(f"finished {image}")

        def count_failure(self, kind: str) -> None:
            told.append(kind)

    stages = HubStages(settings)
    stages.sample_started(TASK)
    stages.sample_started(TASK)
    stages.sample_finished(TASK)
    stages.failed(EngineDied("gone"))
    stages._meet(Hub())
    assert told == [f"started {TASK.image}"] * 2 + [f"finished {TASK.image}", "engine_died"]
    stages.sample_finished(TASK)
    assert len(told) == 5
