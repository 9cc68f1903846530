"""The whole of it from one setting:
`+actor_rollout_ref.rollout.agent.agent_loop_manager_class=thunder_rollout.verl_adapter.Manager`.

verl's own managers, with three things beside them. The router is ours: where `rollout.router_config_path` names
none, one is made of `conf/verl/thunder_router.yaml` over verl's servers. The agent loops are those of
`conf/verl/thunder_swe.yaml` unless `agent.agent_loop_config_path` names others. And the job's hub belongs to
the trainer's process, so that no agent loop worker's death ends the sandboxes of others; it knows the images
of the samples to come in their order. Workers, router and replicas are watched from there too (see `watch`), for
verl starts none of them again.

V1 (TransferQueue, sync and async) and V0 (DataProto). Partial rollouts and the bound on staleness are verl's
own: its client resumes what a weight update cuts, its sampler drops what is too old (see `staleness`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.checkpoint_engine import CheckpointEngineManager
from verl.experimental.agent_loop.agent_loop import AgentLoopManager
from verl.protocol import DataProto
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.import_utils import resolve_config_path
from verl.utils.ray_utils import auto_await
from verl.workers.rollout.router import get_router_handle

from thunder_rollout.config import conf_dir
from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.verl_rows import AGENT_NAME
from thunder_rollout.verl_adapter.batches import images_of, images_of_files, settle_failed_rows
from thunder_rollout.verl_adapter.figures import thunder_figures
from thunder_rollout.verl_adapter.hub import RemoteHub
from thunder_rollout.verl_adapter.settings import SweSettings, read_settings
from thunder_rollout.verl_adapter.versions import require_tested_verl
from thunder_rollout.verl_adapter.watch import TrainersWatch, set_watch

OUR_ROUTER = "thunder_rollout.verl_adapter.ProgramRouter"
# Of verl: for samples of a worker that is gone, and for a replica that is gone to take new weights.
ENDLESS_WAITS = (ReplayBuffer._wait_for_next_poll, CheckpointEngineManager.update_weights)


class Manager:
    """What verl makes by its name; gives the manager that fits the trainer."""

    @classmethod
    def create(cls, *, config: DictConfig, **given: Any) -> Any:
        """verl's contract. Raises `UserError`."""
        require_tested_verl()
        _require_filter_told(config)
        manager = ManagerV1 if config.transfer_queue.enable else ManagerV0
        return manager.create(config=config, **given)


class _Thunder(AgentLoopManager):
    """What both have beside verl's."""

    async def _init_agent_loop_workers(self) -> None:
        with open_dict(self.config):
            agent = self.config.actor_rollout_ref.rollout.agent
            agent.agent_loop_config_path = agent.agent_loop_config_path or str(conf_dir() / "verl/thunder_swe.yaml")
        self.hub = RemoteHub(loop_settings(agent.agent_loop_config_path).sandbox)
        router = await self._our_router()
        if images := images_of_files(self._data_files()):
            await self.hub.fleet(images)  # what is wrong with sandboxes is told before anything is generated
        await super()._init_agent_loop_workers()
        workers = {f"agent loop worker {i}": worker for i, worker in enumerate(self.agent_loop_workers)}
        watch = TrainersWatch(workers, router, ENDLESS_WAITS)
        watch.start()
        set_watch(watch)

    def _data_files(self) -> list[str]:
        data = self.config.data
        groups = [data.train_files, data.val_files]
        return [file for files in groups for file in ([files] if isinstance(files, str) else files or [])]

    async def _our_router(self) -> Any:
        """The one verl made of its configuration, or a new one, which the workers' client then asks."""
        path = self.config.actor_rollout_ref.rollout.router_config_path
        if path:
            router: Any = OmegaConf.load(resolve_config_path(path))
            named = router.get("router_class")
            if named != OUR_ROUTER:
                raise ConfigError(
                    f"actor_rollout_ref.rollout.router_config_path={path}: its router_class is {named}; set "
                    f"{OUR_ROUTER}, or leave the path null"
                )
            return self.llm_client._load_balancer
        config = self.config
        if config.trainer.v1.trainer_mode == "separate_async" and config.actor_rollout_ref.hybrid_engine:
            raise ConfigError(
                "actor_rollout_ref.rollout.router_config_path: must name conf/verl/thunder_router.yaml under "
                "trainer.v1.trainer_mode=separate_async with hybrid_engine=true, whose servers come and go"
            )
        servers = await self.llm_client._load_balancer.__ray_call__.remote(lambda balancer: dict(balancer._servers))
        self.llm_client._load_balancer = make_router(servers)
        return self.llm_client._load_balancer


class ManagerV1(_Thunder, AgentLoopManagerTQ):
    """Rows go to TransferQueue; what the rollout was like is logged by `sampler`."""

    def generate_sequences(self, prompts: Any) -> None:
        """As verl's: returns when the prompts are handed out."""
        rollout = self.config.actor_rollout_ref.rollout
        n = rollout.val_kwargs.n if "validate" in prompts else rollout.n
        self.hub.expect([image for image in images_of(prompts["extra_info"]) for _ in range(n)])
        super().generate_sequences(prompts)


class ManagerV0(_Thunder):
    """Rows come back as a DataProto. verl's V0 trainer logs a manager's timing alone, so our figures are
    there, as `timing_s/thunder/...`."""

    @auto_await
    async def generate_sequences(self, prompts: DataProto) -> DataProto:
        """As verl's: returns when the rows are there."""
        self.hub.expect(images_of(prompts.non_tensor_batch.get("extra_info", ())))
        output: DataProto = await super().generate_sequences(prompts)
        settle_failed_rows(output, prompts.non_tensor_batch.get("uid"))
        return output

    def _performance_metrics(self, metrics: list[list[dict[str, Any]]], output: DataProto) -> dict[str, float]:
        timing: dict[str, float] = super()._performance_metrics(metrics, output)
        rows: Iterable[Mapping[str, Any]] = output.non_tensor_batch.get("thunder", ())
        return timing | thunder_figures(list(rows))


def make_router(servers: Mapping[str, Any]) -> Any:
    """Ours over these servers, made as verl makes one that its configuration names."""
    return get_router_handle(servers=dict(servers), router_config_path=str(conf_dir() / "verl/thunder_router.yaml"))


def _require_filter_told(config: DictConfig) -> None:
    """verl tells its own sampler alone of `algorithm.filter_groups`; ours would pass it over in silence."""
    filtering = config.algorithm.get("filter_groups")
    sampler = config.trainer.v1.sampler
    is_ours = "thunder_rollout.verl_adapter.sampler" in str((sampler.get("custom_sampler") or {}).get("path"))
    if filtering and filtering.get("enable") and is_ours and config.transfer_queue.enable:
        told = (sampler.get("sampler_kwargs") or {}).get("filter_groups_metric")
        if told != filtering.metric:
            raise ConfigError(
                f"trainer.v1.sampler.sampler_kwargs.filter_groups_metric={told}: algorithm.filter_groups is enabled "
                f"with the metric {filtering.metric}, of which verl tells no custom sampler; set it to the same (and "
                "max_inflight_gen_batches, train_batch_size and gen_batch_size beside it)"
            )


def loop_settings(path: str) -> SweSettings:
    """Those of `thunder_swe` in the agent loops' file, its defaults if it isn't there."""
    entries: Any = OmegaConf.load(resolve_config_path(path))
    for entry in entries:
        if entry.name == AGENT_NAME:
            return read_settings(entry.get("settings"))
    return SweSettings()
