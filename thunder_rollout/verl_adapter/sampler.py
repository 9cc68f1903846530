"""verl's replay buffers, which also log what the rollout of the batch was like, and end a run that lost a part of it.

verl's V1 trainers have no way for a manager to log; what a sampler returns beside the batch they do log. Set

    trainer.v1.sampler.custom_sampler.path=pkg://thunder_rollout.verl_adapter.sampler
    trainer.v1.sampler.custom_sampler.name=make_sampler

Sampling is verl's own. verl does not tell a custom sampler of `algorithm.filter_groups` and
`sync_refill_failed_groups`: whoever wants them repeats them in `trainer.v1.sampler.sampler_kwargs`, where any
argument of verl's `ReplayBuffer` may stand (`poll_interval` too, which verl offers nowhere else). `Manager` refuses
a run whose `algorithm.filter_groups` would be passed over so.

Where verl logs once in several samples (`separate_async.parameter_sync_step`) it sums, averages or takes the greatest
by words in the metrics' names; so our figures are of all their rows together, and come with the last.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import transfer_queue as tq
from ray.exceptions import RayActorError
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from thunder_rollout.errors import ConfigError
from thunder_rollout.verl_adapter.figures import agent_loop_timing, thunder_figures
from thunder_rollout.verl_adapter.hub import find_hub
from thunder_rollout.verl_adapter.versions import require_tested_verl
from thunder_rollout.verl_adapter.watch import find_watch


@dataclass(slots=True)
class SampledRows:
    """What figures are made of: a column each of verl's metrics, its tags and `extra_fields.thunder`."""

    metrics: list[Mapping[str, float]] = field(default_factory=list)
    tags: list[Mapping[str, Any]] = field(default_factory=list)
    thunder: list[Mapping[str, Any] | None] = field(default_factory=list)
    num_samples: int = 0

    def add(self, batch: KVBatchMeta) -> None:
        self.num_samples += 1
        if batch.keys:
            fields = ["metrics", "extra_fields"]
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
            self.metrics += list(data["metrics"])
            self.tags += list(batch.tags)
            self.thunder += [extra.get("thunder") for extra in data["extra_fields"]]

    def figures(self) -> dict[str, float]:
        return agent_loop_timing(self.metrics, self.tags) | thunder_figures(self.thunder)


class _WithFigures(ReplayBuffer):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._rows = SampledRows()

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """As verl's; validation is kept out of the figures, but for the failures that it met. Raises `RolloutDied`, for
        what a dead part of the rollout had is either missing from the batch or waited for without end."""
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        _require_rollout()
        if partition_id != "train":
            return batch, metrics
        self._rows.add(batch)
        if self._rows.num_samples < self.trainer_config.get("parameter_sync_step", 1):
            return batch, metrics
        rows, self._rows = self._rows, SampledRows()
        return batch, metrics | rows.figures() | job_figures()

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        _require_rollout()
        waited: float = super()._wait_for_next_poll(partition_id, last_debug_time)
        return waited


class Sampler(_WithFigures, ReplayBuffer):
    """For the trainer mode `sync`."""


class AsyncSampler(_WithFigures, ReplayBufferAsync):
    """For `colocate_async` and `separate_async`."""


def make_sampler(*, trainer_mode: str, sampler_kwargs: Mapping[str, Any] | None = None, **given: Any) -> ReplayBuffer:
    """verl's contract of a custom sampler. Raises `UnsupportedVerl`, and `ConfigError` for an argument that verl's has
    not."""
    require_tested_verl()
    wanted = dict(sampler_kwargs or {})
    known = inspect.signature(ReplayBuffer.__init__).parameters
    for name in wanted:
        if name not in known or name in given:
            free = ", ".join(sorted(set(known) - set(given) - {"self", "trainer_mode", "sampler_kwargs"}))
            raise ConfigError(f"trainer.v1.sampler.sampler_kwargs.{name}: no such argument; there are: {free}")
    cls = Sampler if trainer_mode == "sync" else AsyncSampler
    return cls(trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, **given, **wanted)


def job_figures() -> dict[str, float]:
    """Of the machinery since the last call: failures by kind, sandboxes, and the router's own. A part that dies
    meanwhile has none."""
    figures: dict[str, float] = {}
    hub, watch = find_hub(), find_watch()
    for call in [*([hub.figures] if hub else []), *([watch.router.metrics] if watch else [])]:
        with contextlib.suppress(RayActorError):
            figures |= ray.get(call.remote())
    return figures


def _require_rollout() -> None:
    if (watch := find_watch()) is not None:
        watch.check()
