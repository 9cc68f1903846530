"""The command line as a user runs it: another process, another folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq


def start(folder: Path, *args: str, **env: str) -> subprocess.Popen[str]:
    """Start `thunder-rollout` in `folder`; its output goes to a pipe, stderr included."""
    command = [sys.executable, "-m", "thunder_rollout.cli", *args]
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # pytest's own process
    environment = inherited | {"PYTHONPATH": str(Path(__file__).parents[2])} | env
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(folder: Path, *args: str, timeout_s: float = 240, **env: str) -> tuple[int, str]:
    """Exit code and output."""
    process = start(folder, *args, **env)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise AssertionError(f"no end after {timeout_s} s:\n{process.communicate()[0]}") from None
    return process.returncode, output


def wait_for_samples(run_dir: Path, count: int, process: subprocess.Popen[str], timeout_s: float = 180) -> set[Path]:
    """The trajectory files once there are `count` of them."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        files = set(run_dir.glob("trajectories/*.parquet"))
        if len(files) >= count:
            return files
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"fewer than {count} samples after {timeout_s} s")


def rows(run_dir: Path) -> list[dict]:
    files = sorted(run_dir.glob("trajectories/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def check_agreement(run_dir: Path) -> None:
    """summary.json says what the parquet files say, and every row keeps the trajectory's contract."""
    said, found = summary(run_dir), rows(run_dir)
    assert said["num_samples"] == len(found)
    assert said["num_resolved"] == sum(row["resolved"] for row in found)
    assert said["resolved_rate"] == said["num_resolved"] / said["num_samples"]
    turns = [turn for row in found for turn in row["turns"]]
    assert said["num_turns"] == len(turns) == sum(row["num_turns"] for row in found)
    assert said["kv_hit_rate"] == sum(t["cached_tokens"] for t in turns) / sum(t["prompt_tokens"] for t in turns)
    for row in found:
        assert len(row["response_ids"]) == len(row["loss_mask"]) == len(row["logprobs"])
        assert sum(row["loss_mask"]) == sum(turn["output_tokens"] for turn in row["turns"])
        for turn in row["turns"]:
            assert turn["prompt_tokens"] == len(row["prompt_ids"]) + turn["start"]
        assert row["reward"] == float(row["resolved"])


def kill_actors(driver: subprocess.Popen[str], cls: str) -> int:
    """`kill -9` every Ray actor of class `cls` below `driver`; how many there were."""
    actors = [p for p in psutil.Process(driver.pid).children(recursive=True) if p.name().startswith(f"ray::{cls}"[:15])]
    for actor in actors:
        actor.kill()
    return len(actors)
