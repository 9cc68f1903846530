"""The driver on a real Ray cluster with engines that have no model: runs, kills and bad input."""

import signal
import time

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.support import cli
from tests.support.killing import GONE_WITHIN_S, local_leftovers, seconds_until_none
from thunder_rollout.config import load_rollout_config
from thunder_rollout.core.decisions import Restore
from thunder_rollout.core.events import BackendDown, ProgramEnded, TurnEnded, TurnRequested
from thunder_rollout.core.scheduler import Scheduler
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.observe.trace import read_trace
from thunder_rollout.runtime.client import LAST_WORD_S
from thunder_rollout.runtime.store import RunStore

KEYS = {
    "num_samples",
    "num_resolved",
    "resolved_rate",
    "steps_per_min",
    "kv_hit_rate",
    "sandbox_backend",
    "wall_s",
    "failures",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_preset("qwen2_test", tmp_path_factory.mktemp("model")).path


@pytest.fixture
def args(model):
    return [
        "rollout",
        "engine.kind=fake",
        f"engine.model={model}",
        "sandbox=local",
        "task.count=3",
        "rollout.n=2",
        "agent.max_turns=3",
        "agent.max_turn_tokens=32",
        "ray.num_cpus=4",
        "observe.log_every_s=1",
        "observe.wandb.mode=disabled",
    ]


def test_a_run_leaves_a_whole_run_folder(args, tmp_path):
    code, output = cli.run(tmp_path, *args, "observe.wandb.mode=auto")
    assert code == 0, output
    folder = tmp_path / "runs" / "latest"
    assert cli.summary(folder).keys() >= KEYS
    assert cli.summary(folder)["num_samples"] == 6
    assert cli.summary(folder)["sandbox_backend"] == "local"
    assert "local sandboxes" in output
    cli.check_agreement(folder)
    assert list(folder.glob("wandb/offline-run-*"))
    entries = read_trace(folder / "trace.jsonl")
    scheduler = Scheduler(load_rollout_config(["engine.model=any"]).scheduler)
    assert [scheduler.handle(event, now) for now, event, _ in entries] == [decisions for _, _, decisions in entries]

    name = "name=" + folder.resolve().name
    code, output = cli.run(tmp_path, *args, name, "task.seed=5")
    assert code == 2, "a folder of other samples is refused"
    assert "another task" in output
    before = cli.summary(folder)
    code, output = cli.run(tmp_path, *args, name)
    assert code == 0, output
    assert cli.summary(folder) == before, "nothing to do changes nothing"


def test_a_killed_run_goes_on_without_redoing_or_losing_a_sample(args, tmp_path):
    slow = [*args, "rollout.concurrency=1", "agent.max_turns=6"]
    process = cli.start(tmp_path, *slow)
    latest = tmp_path / "runs" / "latest"
    finished = cli.wait_for_samples(latest, 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert seconds_until_none(lambda: local_leftovers(RunStore(latest).run_id)) < GONE_WITHIN_S
    before = {file: file.stat().st_mtime_ns for file in finished}
    assert not (latest / "summary.json").exists()

    code, output = cli.run(tmp_path, *slow)
    assert code == 0, output
    assert len(list((tmp_path / "runs").glob("rollout-*"))) == 1
    assert {file: file.stat().st_mtime_ns for file in finished} == before
    assert cli.summary(latest)["num_samples"] == 6
    cli.check_agreement(latest)


def test_ctrl_c_stops_cleanly_and_the_same_command_finishes(args, tmp_path):
    slow = [*args, "rollout.concurrency=1", "agent.max_turns=6", "name=mine"]
    process = cli.start(tmp_path, *slow)
    cli.wait_for_samples(tmp_path / "runs" / "mine", 1, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not cli.summary(tmp_path / "runs" / "mine")["complete"]
    code, output = cli.run(tmp_path, *slow)
    assert code == 0, output
    cli.check_agreement(tmp_path / "runs" / "mine")


def test_more_gpus_than_the_cluster_has_is_refused_by_name(args, tmp_path):
    gpus = ["engine.device=gpu", "engine.num_gpus=1"]
    code, output = cli.run(tmp_path, *args, *gpus)
    assert code == 2, output
    assert "engine.num_gpus" in output
    assert "Traceback" not in output


def test_a_worker_that_dies_is_replaced_and_no_sample_is_lost(args, tmp_path):
    only_worker = [*args, "rollout.num_workers=1", "rollout.concurrency=2", "agent.max_turns=6"]
    process = cli.start(tmp_path, *only_worker)
    latest = tmp_path / "runs" / "latest"
    cli.wait_for_samples(latest, 1, process)
    assert cli.kill_actors(process, "WorkerActor") == 1
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "died; its samples start again" in output
    assert cli.summary(latest)["num_samples"] == 6
    cli.check_agreement(latest)


def test_checkpoints_are_loaded_under_load_and_every_token_has_its_weights(args, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step_1").mkdir(parents=True)
    (tmp_path / "step_2").mkdir()
    slow = [*args, f"rollout.weights_folder={checkpoints}", "agent.max_turns=12", "agent.max_turn_tokens=200"]
    process = cli.start(tmp_path, *slow, "task.count=6", "rollout.concurrency=6")
    latest = tmp_path / "runs" / "latest"
    cli.wait_for_samples(latest, 2, process)
    (tmp_path / "step_2").rename(checkpoints / "step_2")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert cli.summary(latest)["num_samples"] == 12
    assert cli.summary(latest)["failures"] == {}
    cli.check_agreement(latest)
    turns = [turn for row in cli.rows(latest) for turn in row["turns"]]
    assert all(sum(s["num_tokens"] for s in turn["weights"]) == turn["output_tokens"] for turn in turns)
    versions = [segment["version"] for turn in turns for segment in turn["weights"]]
    assert set(versions) == {"step_1", "step_2"}, "what lay there at the start serves from the first token"


def test_engines_that_are_killed_serve_again_and_no_sample_is_lost(args, tmp_path):
    """All of them at once, twice: for a while none is left, but they are coming."""
    slow = [*args, "rollout.num_workers=1", "rollout.concurrency=2", "agent.max_turns=6", "rollout.max_attempts=1"]
    process = cli.start(tmp_path, *slow)
    latest = tmp_path / "runs" / "latest"
    for num_samples in (1, 3):
        cli.wait_for_samples(latest, num_samples, process)
        assert cli.kill_actors(process, "EngineActor") == 2
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "generation=2 is up again" in output
    assert cli.summary(latest)["num_samples"] == 6
    assert cli.summary(latest)["failures"] == {}
    cli.check_agreement(latest)


@pytest.mark.timeout(500)
def test_nodes_join_and_die_with_their_engines_while_a_rollout_runs(args, tmp_path):
    """Engines of four GPUs (Ray takes our word for them) on nodes of four. The dying node falls silent, as one
    without power or network does; nobody waits until Ray has noticed, half a minute later."""
    node = {"num_cpus": 1, "num_gpus": 4}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        parallel = ["engine.device=gpu", "engine.tensor_parallel_size=4", "engine.report_s=0.2", "engine.hang_s=3"]
        fleet = [f"ray.address={nodes.address}", "ray.num_cpus=null", "rollout.num_engines=1", "rollout.max_engines=2"]
        process = cli.start(tmp_path, *args, *parallel, *fleet, "rollout.n=50", "rollout.concurrency=4")
        latest = tmp_path / "runs" / "latest"
        cli.wait_for_samples(latest, 1, process)
        second = nodes.add_node(**node)
        wait_for_trace(latest, process, '"BackendUp", "backend": "engine1", "generation": 0')
        wait_for_trace(latest, process, '"backend": "engine1", "generation": 0, "request"', times=20)
        raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
        for part in (raylet, *raylet.children(recursive=True)):
            part.suspend()
        wait_for_trace(latest, process, '"BackendDown", "backend": "engine1", "generation": 0')
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        assert cli.summary(latest)["failures"] == {}
        cli.check_agreement(latest)
        assert {turn["backend"] for row in cli.rows(latest) for turn in row["turns"]} == {"engine0", "engine1"}
        waits_s = waits_after_the_loss_of(latest, "engine1")
        assert waits_s, "no turn was there when the node fell silent"
        assert max(waits_s) < LAST_WORD_S + 5, waits_s
    finally:
        nodes.shutdown()


def waits_after_the_loss_of(run_dir, backend):
    """Of each program with a turn there when it was first lost, the seconds until it asked again."""
    running, waits_s, lost_s = set(), {}, None
    for now_s, event, decisions in read_trace(run_dir / "trace.jsonl"):
        if lost_s is None:
            running |= {d.program for d in decisions if isinstance(d, Restore) and d.backend == backend}
            if isinstance(event, TurnEnded | ProgramEnded):
                running.discard(event.program)
            if isinstance(event, BackendDown) and event.backend == backend:
                lost_s = now_s
        elif isinstance(event, TurnRequested) and event.program in running:
            waits_s.setdefault(event.program, now_s - lost_s)
    assert waits_s.keys() == running
    return list(waits_s.values())


def wait_for_trace(run_dir, process, text, times=1):
    for _ in range(600):
        if (run_dir / "trace.jsonl").read_text().count(text) >= times:
            return
        assert process.poll() is None, f"ended before {text}: {process.communicate()[0]}"
        time.sleep(0.1)
    pytest.fail(f"no {text} within 60 s")
