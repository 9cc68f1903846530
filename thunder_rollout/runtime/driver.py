"""The rollout driver: all samples of all tasks, each to its parquet file, on one Ray cluster.

Nothing finished is lost and nothing finished is redone (see `store`). A sample that an
infrastructure failure interrupts is tried again up to `rollout.max_attempts` times and then
counted under its failure's kind. One that was dropped for being stale starts again as often as it
takes, and is counted apart. Cancelling `run_rollout` (Ctrl-C) stops the samples, removes
their sandboxes and still writes `summary.json`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from thunder_rollout.config import RolloutConfig
from thunder_rollout.engine.config import check_model_folder
from thunder_rollout.errors import GradingFailed, InfrastructureFailure, RequestPoisoned, Stale
from thunder_rollout.observe.metrics import MetricsSnapshot
from thunder_rollout.observe.progress import Progress, SampleCounts
from thunder_rollout.observe.wandb import WandbRun
from thunder_rollout.runtime.aio import task_group
from thunder_rollout.runtime.cluster import Cluster
from thunder_rollout.runtime.store import RunStore, SampleKey
from thunder_rollout.runtime.summary import SessionTotals, summarise
from thunder_rollout.runtime.worker import SampleOutcome
from thunder_rollout.tasks.config import build_tasks
from thunder_rollout.tasks.task import Task

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Session:
    """This process's share of a run."""

    wanted: list[SampleKey]
    counts: SampleCounts
    outcomes: list[SampleOutcome] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    num_stale: int = 0  # attempts that were dropped since their tokens were of weights too old
    rollout_s: float = 0.0
    metrics: MetricsSnapshot | None = None


def prepare(config: RolloutConfig) -> tuple[RolloutConfig, list[Task]]:
    """The configuration with the model's folder resolved (links followed, so that it stays the same on
    resume and means the same in every process), and the tasks.

    Raises `UserError` for what can be known before anything is started.
    """
    engine = config.engine
    if engine.kind == "vllm":
        check_model_folder(engine.model)
    folder = Path(engine.model).expanduser()
    if folder.is_dir():
        config = replace(config, engine=replace(engine, model=str(folder.resolve())))
    return config, build_tasks(config.task)


async def run_rollout(
    config: RolloutConfig, tasks: list[Task], store: RunStore, settings: dict[str, Any]
) -> dict[str, Any]:
    """Finish the run in `store` (already open) and return its summary.

    `settings` is the resolved configuration as plain data, for wandb. Raises `UserError` for what
    only a started cluster can tell (resources, KV capacity).
    """
    started = time.monotonic()
    wanted = [(task, SampleKey(task.instance_id, sample)) for task in tasks for sample in range(config.rollout.n)]
    finished = store.finished()
    work = [(task, key) for task, key in wanted if key not in finished]
    logger.info("run %s: %d samples, %d finished before", store.folder, len(wanted), len(wanted) - len(work))
    before = store.read_summary()
    if not work and before is not None and before["complete"]:
        return before
    session = _Session([key for _, key in wanted], _counts(store, wanted))
    cluster = Cluster(config, store, tasks=tasks)

    def summary_now() -> dict[str, Any]:
        return _summary(store, session, cluster.sandbox_backend, time.monotonic() - started)

    try:
        if work:
            starting = asyncio.create_task(asyncio.to_thread(WandbRun, config.observe.wandb, store.folder, settings))
            async with cluster:
                wandb = await starting
                try:
                    await _run_samples(config, cluster, session, work, wandb)
                finally:
                    await asyncio.shield(asyncio.to_thread(wandb.finish, summary_now()))
    finally:
        cluster.shutdown()
        summary = summary_now()  # only now can no worker finish another sample
    return summary


def _counts(store: RunStore, wanted: list[tuple[Task, SampleKey]]) -> SampleCounts:
    """Where a resumed run stands."""
    keys = {key for _, key in wanted}
    rows = store.read_columns(["instance_id", "sample", "resolved"])
    resolved = [row["resolved"] for row in rows if SampleKey(row["instance_id"], row["sample"]) in keys]
    return SampleCounts(total=len(wanted), done=len(resolved), resolved=sum(resolved))


async def _run_samples(
    config: RolloutConfig, cluster: Cluster, session: _Session, work: list[tuple[Task, SampleKey]], wandb: WandbRun
) -> None:
    slots = asyncio.Semaphore(config.rollout.concurrency)
    began = time.monotonic()
    try:
        async with task_group() as group:
            watchers = [
                group.create_task(_watch(config, cluster, session, wandb), name="watch"),
                group.create_task(cluster.supervise(), name="supervise"),
                group.create_task(cluster.follow_weights(), name="follow weights"),
            ]
            samples = []
            cluster.expect([task for task, _ in work])
            coming = iter(work if config.scheduler.prepare_ahead else ())
            for task, key in islice(coming, config.scheduler.prepare_ahead):
                await cluster.announce(task, key)
            for task, key in work:
                await slots.acquire()
                sample = group.create_task(_run_sample(config, cluster, session, task, key))
                sample.add_done_callback(lambda _: slots.release())
                samples.append(sample)
                for next_task, next_key in islice(coming, 1):
                    await cluster.announce(next_task, next_key)
            await asyncio.wait(samples)
            for watcher in watchers:
                watcher.cancel()
    finally:
        session.rollout_s = time.monotonic() - began


async def _run_sample(config: RolloutConfig, cluster: Cluster, session: _Session, task: Task, key: SampleKey) -> None:
    counts = session.counts
    counts.running += 1
    cluster.sample_started(task)
    try:
        tries, attempt = config.rollout.max_attempts, -1
        while tries > 0:
            tries, attempt = tries - 1, attempt + 1
            try:
                outcome = await cluster.run_sample(task, key, attempt)
            except Stale:
                session.num_stale += 1
                tries += 1  # the trainer's doing, and none of the machinery's
                continue
            except InfrastructureFailure as failure:
                logger.warning("task=%s sample=%d attempt=%d: %s", key.instance_id, key.sample, attempt, failure)
                last = failure
                if isinstance(failure, GradingFailed | RequestPoisoned):
                    break  # tried again already, without playing the episode anew
                continue
            session.outcomes.append(outcome)
            counts.done += 1
            counts.resolved += outcome.resolved
            return
        session.failures[last.kind] += 1
        counts.failures[last.kind] += 1
        cluster.store.write_failure(key, last.kind, str(last))
    finally:
        counts.running -= 1
        cluster.sample_finished(task)


async def _watch(config: RolloutConfig, cluster: Cluster, session: _Session, wandb: WandbRun) -> None:
    """Feed the display and wandb until cancelled; a scheduler that died ends the run here."""
    observe = config.observe
    title = f"{cluster.store.folder}  [{config.scheduler.policy}, {cluster.sandbox_backend} sandboxes]"
    logged_at = float("-inf")
    with Progress(title, enabled=observe.progress, line_every_s=observe.log_every_s) as progress:
        while True:
            session.metrics = await cluster.scheduler.metrics()
            progress.update(session.counts, session.metrics, await cluster.num_sandboxes())
            if time.monotonic() - logged_at >= observe.log_every_s:
                logged_at = time.monotonic()
                wandb.log(_wandb_values(session))
            await asyncio.sleep(observe.refresh_s)


def _wandb_values(session: _Session) -> dict[str, float]:
    """verl's names where verl has one, ours under `thunder/`."""
    metrics, outcomes = session.metrics, session.outcomes
    assert metrics is not None
    values = {
        "thunder/samples_done": float(session.counts.done),
        "thunder/steps_per_min": metrics.steps_per_min,
        "thunder/kv_hit_rate": metrics.kv_hit_rate,
        "thunder/imbalance": metrics.imbalance,
        "thunder/num_stale": float(session.num_stale),
        "thunder/num_waiting": float(metrics.scheduler.num_waiting),
        "thunder/num_pauses": float(metrics.num_pauses),
        "thunder/queue_s": metrics.queue_s,
        "thunder/tool_s": metrics.tool_s,
        "thunder/sandbox/wait_p95_s": metrics.sandbox_wait_p95_s,
        "thunder/sandbox/idle_s": metrics.sandbox_idle_s,
        "thunder/output_tokens_per_s": metrics.output_tokens / metrics.time_s if metrics.time_s else 0.0,
    }
    for backend in metrics.scheduler.backends:
        values[f"thunder/backend/{backend.backend}/demand"] = backend.demand_tokens / backend.capacity_tokens
        values[f"thunder/backend/{backend.backend}/running"] = float(backend.num_in_flight)
        if backend.drift_tokens is not None:
            values[f"thunder/backend/{backend.backend}/drift"] = backend.drift_tokens / backend.capacity_tokens
    if outcomes:
        values["critic/score/mean"] = sum(o.reward for o in outcomes) / len(outcomes)
        values["num_turns/mean"] = sum(o.num_turns for o in outcomes) / len(outcomes)
    return values


def _summary(store: RunStore, session: _Session, sandbox_backend: str, wall_s: float) -> dict[str, Any]:
    summary = summarise(
        store,
        SessionTotals(
            expected=session.wanted,
            num_turns=sum(outcome.num_turns for outcome in session.outcomes),
            rollout_s=session.rollout_s,
            wall_s=wall_s,
            failures=session.failures,
            num_stale=session.num_stale,
            sandbox_backend=sandbox_backend,
        ),
    )
    store.write_summary(summary)
    return summary
