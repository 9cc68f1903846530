"""The manager and the sampler under verl's own contracts, without a cluster."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from pyarrow import parquet
from verl.checkpoint_engine import CheckpointEngineManager
from verl.protocol import DataProto
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.utils import tensordict_utils as tu
from verl.utils.import_utils import load_class_from_fqn, load_extern_type
from verl.workers.config import CheckpointEngineConfig

from tests.support.verl_fakes import verl_config
from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.toy import generate
from thunder_rollout.tasks.verl_rows import verl_row
from thunder_rollout.verl_adapter import manager as module
from thunder_rollout.verl_adapter import sampler
from thunder_rollout.verl_adapter.batches import images_of, images_of_files, settle_failed_rows
from thunder_rollout.verl_adapter.manager import Manager, ManagerV0, ManagerV1
from thunder_rollout.verl_adapter.sampler import make_sampler
from thunder_rollout.verl_adapter.watch import is_inside

GIVEN = {"max_off_policy_threshold": 8, "max_off_policy_strategy": "drop", "refill_fn": lambda count: count}


def test_verl_finds_the_manager_and_the_sampler_by_their_names() -> None:
    assert load_class_from_fqn("thunder_rollout.verl_adapter.Manager", "AgentLoopManager") is Manager
    assert load_extern_type("pkg://thunder_rollout.verl_adapter.sampler", "make_sampler") is make_sampler


@pytest.mark.parametrize(("v1", "expected"), [(True, ManagerV1), (False, ManagerV0)])
def test_the_manager_fits_the_trainer(v1: bool, expected: type, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[type] = []

    def create(cls: type, **given: Any) -> None:
        made.append(cls)

    monkeypatch.setattr(ManagerV1, "create", classmethod(create))
    monkeypatch.setattr(ManagerV0, "create", classmethod(create))
    Manager.create(config=verl_config(f"transfer_queue.enable={v1}"), llm_client=None)
    assert made == [expected]


def test_a_filter_that_our_sampler_would_not_hear_of_is_refused() -> None:
    wanted = (
        "transfer_queue.enable=True",
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.metric=acc",
        "+trainer.v1.sampler.custom_sampler.path=pkg://thunder_rollout.verl_adapter.sampler",
    )
    with pytest.raises(ConfigError, match="filter_groups_metric=None"):
        Manager.create(config=verl_config(*wanted))
    told = "+trainer.v1.sampler.sampler_kwargs.filter_groups_metric=acc"
    module._require_filter_told(verl_config(*wanted, told))


def manager_of(*overrides: str) -> ManagerV1:
    config: DictConfig = OmegaConf.create(OmegaConf.to_container(verl_config("transfer_queue.enable=True", *overrides)))
    return ManagerV1(config=config, llm_client=Client())


class Client:
    """A client whose balancer can be read as verl's."""

    def __init__(self) -> None:
        self._load_balancer: Any = self
        self._servers = {"server0": "handle0"}

    @property
    def __ray_call__(self) -> Any:
        return self

    async def remote(self, function: Any) -> Any:
        return function(self)


async def test_a_router_is_made_over_verls_servers_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_router", lambda servers: ("router", servers))
    manager = manager_of()
    assert await manager._our_router() == ("router", {"server0": "handle0"})
    assert manager.llm_client._load_balancer == ("router", {"server0": "handle0"})


async def test_a_pool_that_changes_needs_a_router_of_verls_making() -> None:
    with pytest.raises(ConfigError, match="router_config_path"):
        await manager_of("trainer.v1.trainer_mode=separate_async")._our_router()


async def test_another_router_is_refused_by_name(tmp_path: Any) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("router_class: somebody.elses.Router\n")
    with pytest.raises(ConfigError, match="somebody"):
        await manager_of(f"actor_rollout_ref.rollout.router_config_path={file}")._our_router()


async def test_the_router_that_verl_made_stays(tmp_path: Any) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(f"router_class: {module.OUR_ROUTER}\n")
    manager = manager_of(f"actor_rollout_ref.rollout.router_config_path={file}")
    assert await manager._our_router() is manager.llm_client._load_balancer


class Hub:
    def __init__(self) -> None:
        self.expected: list[str] = []

    def expect(self, images: list[str]) -> None:
        self.expected += images


@pytest.mark.parametrize(("validate", "samples"), [(False, 3), (True, 2)])
def test_a_batch_tells_the_hub_what_images_come_in_their_order(validate: bool, samples: int) -> None:
    manager: Any = manager_of("actor_rollout_ref.rollout.n=3", "actor_rollout_ref.rollout.val_kwargs.n=2")
    manager.hub = Hub()
    rows = np.array([{"image": "a"}, {"image": "b"}], dtype=object)
    batch = tu.get_tensordict({"uid": np.array(["u", "v"], dtype=object), "extra_info": rows})
    tu.assign_non_tensor_data(batch, "global_steps", 1)
    if validate:
        tu.assign_non_tensor_data(batch, "validate", True)
    manager.agent_loop_workers = []
    with pytest.raises(ValueError):  # verl's own part, which has nobody to hand the rows to
        manager.generate_sequences(batch)
    assert manager.hub.expected == ["a"] * samples + ["b"] * samples


def test_a_trainer_that_hands_weights_to_a_dead_replica_is_found_waiting() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Actors:
        """Blocks as a rank does whose replica takes no weights."""

        def update_weights(self, **given: Any) -> None:
            entered.set()
            leave.wait()
            raise RuntimeError("the test is over")

    engine = CheckpointEngineManager(CheckpointEngineConfig(backend="naive"), actor_wg=Actors(), replicas=[])

    def train() -> None:
        with pytest.raises(RuntimeError):
            engine.update_weights(1)

    assert not is_inside(module.ENDLESS_WAITS)
    trainer = threading.Thread(target=train)
    trainer.start()
    entered.wait()
    assert is_inside(module.ENDLESS_WAITS)
    leave.set()
    trainer.join()
    assert not is_inside(module.ENDLESS_WAITS)


def test_figures_are_read_of_the_rows_as_the_queue_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"generate_sequences": 2.0, "tool_calls": 1.0, "compute_score": 0.0}
    rows = [{"metrics": metrics, "extra_fields": {"thunder": None}}, {"metrics": metrics, "extra_fields": {}}]
    stored = tu.list_of_dict_to_tensordict(rows)
    monkeypatch.setattr(sampler.tq, "kv_batch_get", lambda **asked: stored)
    tags = [{"prompt_len": 1, "response_len": 2}] * 2
    batch = sampler.KVBatchMeta(partition_id="train", keys=["u_0_0", "u_1_0"], tags=tags)
    sampled = sampler.SampledRows()
    sampled.add(sampler.KVBatchMeta(partition_id="train", keys=[], tags=[]))
    assert sampled.figures() == {}
    sampled.add(batch)
    assert sampled.figures()["timing_s/agent_loop/generate_sequences/mean"] == 2.0


def test_figures_are_of_all_that_is_sampled_between_two_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl would add up the seconds of a step's samples, and average its counts."""
    took_s = iter([1.0, 5.0, 30.0, 7.0])
    empty = sampler.KVBatchMeta(partition_id="val", keys=[], tags=[])
    one = sampler.KVBatchMeta(partition_id="train", keys=["u"], tags=[{"prompt_len": 1, "response_len": 2}])

    def sample(self: Any, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
        return (one if partition_id == "train" else empty), {"theirs": 1}

    def get(**asked: Any) -> Any:
        metrics = {"generate_sequences": next(took_s), "tool_calls": 0.0, "compute_score": 0.0}
        return {"metrics": [metrics], "extra_fields": [{}]}

    monkeypatch.setattr(ReplayBufferAsync, "sample", sample)
    monkeypatch.setattr(sampler.tq, "kv_batch_get", get)
    monkeypatch.setattr(sampler, "find_hub", lambda: None)
    config = OmegaConf.create({"parameter_sync_step": 2})
    buffer = make_sampler(trainer_mode="separate_async", trainer_config=config, sampler_kwargs={}, **GIVEN)
    logged = [buffer.sample(1, partition, 1)[1] for partition in ("train", "val", "train", "train", "train")]
    name = "timing_s/agent_loop/generate_sequences/mean"
    assert [step.get(name) for step in logged] == [None, None, 3.0, None, 18.5]
    assert all(step["theirs"] == 1 for step in logged)


def test_images_are_those_of_rows_that_name_one() -> None:
    assert images_of([{"image": "a"}, None, {}, {"image": "b"}]) == ["a", "b"]


def test_images_are_read_out_of_the_files_that_have_them(tmp_path: Path) -> None:
    tasks = generate(seed=0, count=3, difficulty="easy")
    rows = [verl_row(task, split="train", index=place) for place, task in enumerate(tasks)]
    ours, others = str(tmp_path / "ours.parquet"), str(tmp_path / "others.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), ours)
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p", "extra_info": {"index": 0}}]), others)
    text = str(tmp_path / "text.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p", "extra_info": "of another loop"}]), text)
    assert images_of_files([ours, others, text, "hdfs://elsewhere.parquet"]) == [tasks[0].image]


def test_a_failed_row_leaves_the_mean_of_its_group_where_it_is() -> None:
    scores = torch.zeros(5, 3)
    scores[0, 2], scores[1, 1], scores[4, 0] = 1.0, 0.5, 1.0
    rows = np.empty(5, dtype=object)
    rows[:] = [
        {"turns": 1.0},
        {"turns": 1.0},
        {"failure": "engine_died"},
        {"failure": "sandbox_failed"},
        {"turns": 1.0},
    ]
    accuracies = np.array([1.0, 0.0, 0.0, 0.0, 1.0], dtype=object)
    output = DataProto.from_dict(tensors={"rm_scores": scores}, non_tensors={"thunder": rows, "acc": accuracies})
    settle_failed_rows(output, ["g", "g", "g", "alone", "h"])
    assert output.batch["rm_scores"].sum(dim=1).tolist() == pytest.approx([1.0, 0.5, 0.75, 2.5 / 3, 1.0])
    assert output.non_tensor_batch["acc"].tolist() == pytest.approx([1.0, 0.0, 0.5, 2 / 3, 1.0])


@pytest.mark.parametrize(("mode", "kind"), [("sync", ReplayBuffer), ("separate_async", ReplayBufferAsync)])
def test_the_sampler_is_verls_own_of_the_mode_with_the_arguments_repeated(mode: str, kind: type) -> None:
    wanted = {"poll_interval": 0.1, "sync_refill_failed_groups": True, "gen_batch_size": 1}
    buffer = make_sampler(trainer_mode=mode, trainer_config={}, sampler_kwargs=wanted, **GIVEN)
    assert isinstance(buffer, kind)
    assert (buffer.poll_interval, buffer.sync_refill_failed_groups) == (0.1, True)


@pytest.mark.parametrize("name", ["pol_interval", "refill_fn"])
def test_an_argument_that_verls_sampler_has_not_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make_sampler(trainer_mode="sync", trainer_config={}, sampler_kwargs={name: 1}, **GIVEN)
