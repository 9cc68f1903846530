"""The driver's sample loop on a cluster that is scripted: retries, failures and giving up."""

import asyncio
import json
from dataclasses import dataclass, field, replace

import pytest

from thunder_rollout.config import RolloutConfig, load_rollout_config
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.errors import EngineDied, GradingFailed, RequestPoisoned, SandboxFailed, Stale, ThunderError
from thunder_rollout.observe.config import WandbConfig
from thunder_rollout.observe.metrics import MetricsSnapshot
from thunder_rollout.observe.progress import SampleCounts
from thunder_rollout.observe.wandb import WandbRun
from thunder_rollout.runtime.driver import _run_samples, _Session
from thunder_rollout.runtime.service import SchedulerService
from thunder_rollout.runtime.store import RunStore, SampleKey
from thunder_rollout.runtime.worker import SampleOutcome
from thunder_rollout.tasks.task import Task

TASK = Task(instance_id="t", repo="r", base_commit="c", problem_statement="p", image="i", fail_to_pass=("a.py::b",))


class Scheduler:
    def __init__(self, broken: ThunderError | None) -> None:
        self._service = SchedulerService(SchedulerConfig())
        self._broken = broken

    async def metrics(self) -> MetricsSnapshot:
        if self._broken:
            raise self._broken
        return self._service.metrics()


@dataclass
class ScriptedCluster:
    """`script` gives what each (sample, attempt) raises; everything else is resolved."""

    store: RunStore
    script: dict[tuple[int, int], Exception] = field(default_factory=dict)
    broken: ThunderError | None = None
    sandbox_backend: str = "fake"
    calls: list[tuple[int, int]] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    under_way: list[str] = field(default_factory=list)
    num_known: list[int] = field(default_factory=list)  # samples announced or begun, as each began
    announced: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.broken)

    def expect(self, tasks: list[Task]) -> None:
        self.expected = [task.instance_id for task in tasks]

    async def announce(self, task: Task, key: SampleKey) -> None:
        assert not any(key.sample == sample for sample, _ in self.calls), "before it begins"
        self.announced.append(key.sample)

    def sample_started(self, task: Task) -> None:
        self.under_way.append(task.instance_id)

    def sample_finished(self, task: Task) -> None:
        self.under_way.remove(task.instance_id)

    async def run_sample(self, task: Task, key: SampleKey, attempt: int) -> SampleOutcome:
        self.calls.append((key.sample, attempt))
        self.num_known.append(len(self.announced))
        await asyncio.sleep(0)
        if error := self.script.get((key.sample, attempt)):
            raise error
        return SampleOutcome(key=key, resolved=True, reward=1.0, num_turns=2, end_reason="submitted", wall_s=1.0)

    async def num_sandboxes(self) -> int:
        return 0

    async def supervise(self) -> None:
        await asyncio.Event().wait()

    async def follow_weights(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture(scope="module")
def config() -> RolloutConfig:
    config = load_rollout_config(["engine.model=any", "rollout.max_attempts=3", "observe.progress=false"])
    return replace(config, observe=replace(config.observe, refresh_s=0.01))


@pytest.fixture
def play(config, tmp_path):
    async def run(script=None, *, samples: int = 2, broken=None, config=config):
        store = RunStore(tmp_path)
        cluster = ScriptedCluster(store, script or {}, broken)
        work = [(TASK, SampleKey("t", i)) for i in range(samples)]
        session = _Session([key for _, key in work], SampleCounts(total=samples))
        wandb = WandbRun(WandbConfig(mode="disabled"), tmp_path, {})
        await _run_samples(config, cluster, session, work, wandb)
        return session, cluster

    return run


async def test_an_interrupted_sample_is_tried_again(play):
    session, cluster = await play({(0, 0): SandboxFailed("gone"), (0, 1): EngineDied("gone")})
    assert session.counts.done == session.counts.resolved == 2
    assert sorted(cluster.calls) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert not session.failures
    assert cluster.expected == ["t", "t"]
    assert not cluster.under_way, "every sample that started was reported finished"


async def test_samples_are_announced_in_their_order_so_many_ahead_as_may_be_prepared(play, config):
    two_slots = replace(config.rollout, concurrency=2)
    three_ahead = replace(config, rollout=two_slots, scheduler=replace(config.scheduler, prepare_ahead=3))
    _, cluster = await play(samples=8, config=three_ahead)
    assert cluster.announced == list(range(8))
    assert all(known - begun <= 3 + 2 for begun, known in enumerate(cluster.num_known)), "two may have begun at once"
    none_ahead = replace(config, rollout=two_slots, scheduler=replace(config.scheduler, prepare_ahead=0))
    _, cluster = await play(samples=8, config=none_ahead)
    assert (cluster.announced, len(cluster.calls)) == ([], 8)


async def test_a_sample_that_keeps_failing_is_counted_by_kind_and_written_down(play, tmp_path):
    session, _ = await play({(0, i): SandboxFailed("no room") for i in range(3)})
    assert session.failures == {"sandbox_failed": 1}
    assert session.counts.done == 1
    line = json.loads((tmp_path / "failures.jsonl").read_text())
    assert (line["instance_id"], line["sample"], line["kind"], line["message"]) == ("t", 0, "sandbox_failed", "no room")


async def test_a_grader_that_failed_for_good_does_not_replay_the_episode(play):
    session, cluster = await play({(0, 0): GradingFailed("hung")}, samples=1)
    assert cluster.calls == [(0, 0)]
    assert session.failures == {"grading_failed": 1}


async def test_a_poisoned_request_is_reported_and_not_tried_again(play):
    session, cluster = await play({(0, 0): RequestPoisoned("twice")}, samples=2)
    assert sorted(cluster.calls) == [(0, 0), (1, 0)]
    assert session.failures == {"request_poisoned": 1}


async def test_a_stale_sample_starts_again_without_costing_it_a_try(play):
    script = {(0, i): Stale("old tokens") for i in range(5)} | {(0, 5): EngineDied("x"), (0, 6): Stale("old tokens")}
    session, cluster = await play(script, samples=1)
    assert cluster.calls == [(0, i) for i in range(8)]
    assert (session.counts.done, session.num_stale) == (1, 6)
    assert not session.failures


async def test_any_other_error_ends_the_run_as_itself(play):
    with pytest.raises(ThunderError, match="the scheduler stopped"):
        await play({(0, 0): ThunderError("the scheduler stopped")})


async def test_a_dead_scheduler_ends_the_run(play):
    with pytest.raises(ThunderError, match="broken"):
        await play({(0, i): SandboxFailed("x") for i in range(3)}, broken=ThunderError("broken"))
