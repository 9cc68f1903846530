"""The run folder: what a run leaves, and what lets it go on after a crash.

    runs/<name>/
      config.yaml             the resolved configuration; a resume must bring the same
      trajectories/*.parquet  one row and one file a finished sample, renamed into place whole
      failures.jsonl          samples given up after infrastructure failures (a resume tries again)
      trace.jsonl             every event and decision of the scheduler
      summary.json            totals over all finished samples, written at the end
    runs/latest -> <name>

A sample is finished exactly when its parquet file exists, so a killed run loses only what was in
flight. `run.lock` is held (flock) while a driver lives; the kernel drops it on any death.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from thunder_rollout.agent.trajectory import Trajectory, TurnRecord, WeightSegment
from thunder_rollout.errors import ConfigError

_SCALARS = {"int": pa.int32(), "float": pa.float32(), "str": pa.string()}


def _struct(cls: Any) -> pa.DataType:
    """Arrow's type of a record: each field by its annotation, `X | None` as X."""
    types = _SCALARS | {"list[WeightSegment]": pa.list_(_SEGMENT)} if cls is TurnRecord else _SCALARS
    return pa.struct([pa.field(f.name, types[str(f.type).removesuffix(" | None")]) for f in fields(cls)])


_SEGMENT = _struct(WeightSegment)
_TURN = _struct(TurnRecord)

SCHEMA = pa.schema(
    [
        pa.field("instance_id", pa.string()),
        pa.field("sample", pa.int32()),  # 0 .. rollout.n - 1 within the group of one task
        pa.field("attempt", pa.int32()),  # 0 unless infrastructure failures made it start again
        pa.field("repo", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("response_ids", pa.list_(pa.int32())),
        pa.field("loss_mask", pa.list_(pa.int8())),  # 1 = generated, aligned with response_ids
        pa.field("logprobs", pa.list_(pa.float32())),  # aligned with response_ids, 0 where masked
        pa.field("turns", pa.list_(_TURN)),
        pa.field("num_turns", pa.int32()),
        pa.field("end_reason", pa.string()),
        pa.field("reward", pa.float32()),
        pa.field("resolved", pa.bool_()),
        pa.field("grade_reason", pa.string()),
        pa.field("grade_log", pa.string()),
        pa.field("patch", pa.binary()),
        pa.field("model", pa.string()),
        pa.field("temperature", pa.float32()),
        pa.field("sandbox_backend", pa.string()),
        pa.field("sandbox_wait_s", pa.float32()),  # the agent waited this long for its sandbox
        pa.field("grade_s", pa.float32()),
        pa.field("started_at", pa.float64()),  # seconds since the epoch
        pa.field("finished_at", pa.float64()),
    ]
)


# A resumed run may change anything else: engines, scheduler, concurrency, what is shown.
_SAMPLE_SETTINGS = (
    "task",
    "agent",
    "grading",
    "engine.model",
    *(f"rollout.{name}" for name in ("n", "temperature", "top_p", "top_k")),
)


@dataclass(frozen=True, slots=True, order=True)
class SampleKey:
    instance_id: str
    sample: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSample:
    """One row of `SCHEMA`, before it is one."""

    key: SampleKey
    attempt: int
    repo: str
    kind: str
    trajectory: Trajectory
    reward: float
    resolved: bool
    grade_reason: str
    grade_log: str
    patch: bytes
    model: str
    temperature: float
    sandbox_backend: str
    sandbox_wait_s: float
    grade_s: float
    started_at: float
    finished_at: float

    def row(self) -> dict[str, Any]:
        flat = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("key", "trajectory")}
        trajectory = self.trajectory
        return flat | {
            "instance_id": self.key.instance_id,
            "sample": self.key.sample,
            "prompt_ids": trajectory.prompt_ids,
            "response_ids": trajectory.response_ids,
            "loss_mask": trajectory.loss_mask,
            "logprobs": trajectory.logprobs,
            "turns": [asdict(turn) for turn in trajectory.turns],
            "num_turns": len(trajectory.turns),
            "end_reason": str(trajectory.end_reason),
        }


class RunStore:
    """Reads and writes one run folder. Cheap to build anywhere the folder is mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trajectories = folder / "trajectories"
        self._lock: TextIO | None = None

    @property
    def run_id(self) -> str:
        """Unique to this folder on this machine: what sandboxes are labelled with."""
        digest = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()
        return f"{self.folder.resolve().name}-{digest[:8]}"

    def open(self, config_yaml: str) -> None:
        """Create or reopen the folder and lock it; raises `ConfigError` if it is in use or holds
        samples of another kind (other tasks, model, agent or sampling)."""
        self.trajectories.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "run.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"name: the run folder {self.folder} is in use by a running rollout") from None
        saved = self.folder / "config.yaml"
        if saved.exists() and (changed := _changed(saved.read_text(), config_yaml)):
            raise ConfigError(
                f"name: {self.folder} was made with another {', '.join(changed)} (see its config.yaml), which "
                "would mix different samples; choose another name, or remove the folder"
            )
        _write_atomic(saved, config_yaml.encode())
        for leftover in self.trajectories.glob(".*.tmp"):
            leftover.unlink()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def finished(self) -> set[SampleKey]:
        keys = set()
        for path in self.trajectories.glob("*.parquet"):
            name, _, sample = path.stem.rpartition("__")
            keys.add(SampleKey(unquote(name), int(sample)))
        return keys

    def write(self, sample: FinishedSample) -> Path:
        """Put one finished sample on disk; durable and whole when it returns."""
        path = self.trajectories / f"{quote(sample.key.instance_id, safe='')}__{sample.key.sample}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([sample.row()], schema=SCHEMA), sink, compression="zstd")
        _write_atomic(path, sink.getvalue().to_pybytes())
        return path

    def write_failure(self, key: SampleKey, kind: str, message: str) -> None:
        row = {"time": time.time(), **asdict(key), "kind": kind, "message": message}
        with (self.folder / "failures.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_columns(self, columns: list[str]) -> list[dict[str, Any]]:
        """The named columns of every finished sample, ordered by file name."""
        paths = sorted(self.trajectories.glob("*.parquet"))
        return [row for path in paths for row in pq.read_table(path, columns=columns, partitioning=None).to_pylist()]

    def write_summary(self, summary: dict[str, Any]) -> None:
        _write_atomic(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())

    def read_summary(self) -> dict[str, Any] | None:
        try:
            summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        except FileNotFoundError:
            return None
        return summary


def choose_run(runs_dir: Path, name: str | None, config_yaml: str) -> RunStore:
    """Open the folder of this run and point `latest` at it.

    A given `name` is created or resumed. Without one, the run that `latest` points at is resumed if
    it stopped early under the very same configuration; otherwise a new folder is named by the time.
    """
    latest = runs_dir / "latest"
    folder = runs_dir / name if name else None
    if folder is None and latest.exists():
        candidate = RunStore(latest.resolve())
        saved = candidate.folder / "config.yaml"
        complete = (candidate.read_summary() or {}).get("complete", False)
        if not complete and saved.exists() and saved.read_text() == config_yaml:
            try:
                candidate.open(config_yaml)
            except ConfigError:  # that run is still alive: this one is another
                candidate.close()
            else:
                return candidate
    store = RunStore(folder or _new_folder(runs_dir))
    store.open(config_yaml)
    link = runs_dir / ".latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(store.folder.name)
    os.replace(link, latest)
    return store


def _changed(old_yaml: str, new_yaml: str) -> list[str]:
    """The settings that differ, of those that decide what a sample is."""
    old, new = yaml.safe_load(old_yaml), yaml.safe_load(new_yaml)
    return [path for path in _SAMPLE_SETTINGS if _select(old, path) != _select(new, path)]


def _select(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _new_folder(runs_dir: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(1, 100))):
        folder = runs_dir / f"rollout-{stamp}{suffix}"
        if not folder.exists():
            return folder
    raise ConfigError(f"name: could not find a free run folder under {runs_dir}; give a name")


def _write_atomic(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
