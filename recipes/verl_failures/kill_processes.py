"""`kill -9` of one process after another in the middle of verl's training: does it go on, or end and resume?

    python recipes/verl_failures/kill_processes.py [VICTIM ...] [--config separate_async] [--out FOLDER]

Trains by `recipes/verl_cpu_toy` for one epoch of small steps, with a checkpoint after each. While samples are played
(or once all of a step are, for a victim "in the update") the next victim is killed. The run then goes on, or it ends
and is started again. At the end each prompt of the epoch must have been trained on exactly once, with all its samples.
Exits with 1 where one was lost, or a run hung or left processes behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from pyarrow import parquet

RECIPES = Path(__file__).parents[1]
NUM_PROMPTS, NUM_SAMPLES = 4, 4  # of a step
HANGS_S = 600.0  # without an end and without a step
LEFT_BEHIND_S = 20.0
POLL_S = 0.2
QUIET_LOOKS = 5  # without a sandbox: samples are all played
UPDATE = " in the update"
PROCESSES = {  # by the title of the process
    "rollout replica": "ray::vLLMHttpServer",
    "engine core": "VLLM::EngineCore",
    "sandbox host": "ray::SandboxHostActor",
    "sandbox hub": "ray::HubActor",
    "router": "ray::ProgramRouter",
    "agent worker": "ray::AgentLoopWorkerTQ",
}
VICTIMS = ["rollout replica", "engine core", "sandbox host", "agent worker", "engine core" + UPDATE]  # by default
SETTINGS = {
    "data.train_batch_size": NUM_PROMPTS,
    "actor_rollout_ref.rollout.n": NUM_SAMPLES,
    "actor_rollout_ref.actor.ppo_mini_batch_size": NUM_PROMPTS,
    "trainer.total_epochs": 1,
    "trainer.val_before_train": False,
    "trainer.test_freq": -1,
    "trainer.save_freq": 1,
    "trainer.resume_mode": "auto",
    "trainer.default_local_dir": "checkpoints",
    "trainer.rollout_data_dir": "rows",
}
NUM_AHEAD = {"sync": 0, "separate_async": 1}  # steps whose prompts are played before they are trained on
APART = {
    "actor_rollout_ref.actor.ppo_mini_batch_size": NUM_PROMPTS,
    "trainer.v1.separate_async.parameter_sync_step": 1,
    "trainer.v1.sampler.max_off_policy_threshold": 8,  # so that no prompt is dropped for its age
}


@dataclass(slots=True)
class Training:
    """The `number`th start of verl's trainer in `folder`."""

    folder: Path
    number: int
    num_steps: int
    config: str
    process: subprocess.Popen[bytes] = field(init=False)
    seen: set[psutil.Process] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "CONFIG": self.config,
            "RUN": str(self.folder),
            "PYTHON": sys.executable,
            "NUM_TRAIN": str(NUM_PROMPTS * (self.num_steps + NUM_AHEAD[self.config])),
            "NUM_VALIDATION": "4",
            "VERL_FILE_LOGGER_PATH": str(self._metrics),
        }
        settings = SETTINGS | (APART if self.config == "separate_async" else {})
        command = [str(RECIPES / "verl_cpu_toy" / "run_verl_cpu_toy.sh"), *(f"{k}={v}" for k, v in settings.items())]
        command.append(f"trainer.total_training_steps={self.num_steps}")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def _log(self) -> Path:
        return self.folder / f"training{self.number}.log"

    @property
    def _metrics(self) -> Path:
        return self.folder / f"metrics{self.number}.jsonl"

    @property
    def steps(self) -> list[int]:
        """Those that are over."""
        lines = self._metrics.read_text().splitlines(keepends=True) if self._metrics.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    @property
    def reason(self) -> str:
        return reason_of(self._log)

    def processes(self, title: str) -> list[psutil.Process]:
        self.look()
        return [process for process in self.seen if _title(process).startswith(title)]

    def look(self) -> None:
        """Remember the processes that there are, to know those that stay."""
        self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))

    def wait(self, until: Callable[[], bool]) -> bool:
        """Whether it came to `until`, rather than to its end. Raises `TimeoutError` if it hangs."""
        num_steps, moved = 0, time.monotonic()
        while not until():
            time.sleep(POLL_S)
            if self.process.poll() is not None:
                return False
            if len(self.steps) > num_steps:
                num_steps, moved = len(self.steps), time.monotonic()
            if time.monotonic() - moved > HANGS_S:
                raise TimeoutError
        return True

    def num_left(self) -> int:
        """Processes that outlive it for long."""
        _, alive = psutil.wait_procs(self.seen, timeout=LEFT_BEHIND_S)
        return len(alive)

    def kill(self) -> None:
        """Nothing where it has ended."""
        if self.process.poll() is None:
            self.look()
            for process in [*self.seen, self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


def reason_of(log: Path) -> str:
    """Why a training ended, by its log."""
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in log.read_text().splitlines()]
    told = [line for line in lines if "RolloutDied:" in line]
    told = told or [line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed|Died)\b", line)]
    return (told or lines or ["it said nothing"])[-1]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


class Epoch:
    """A training of `num_steps` steps in `folder`, in as many starts as it takes."""

    def __init__(self, folder: Path, num_steps: int, config: str) -> None:
        self._folder = folder
        self._config = config
        self._num_steps = num_steps
        self._num_starts = 0
        self.wrong: list[str] = []
        self._resumed_from: list[int] = []
        self._training = self._start()

    def kill(self, victim: str) -> str:
        """What became of it, as cells of the table. Raises `TimeoutError` if it hangs."""
        training, num_over = self._training, len(self._training.steps)
        is_there = lambda: bool(self.checkpoint) and len(training.steps) >= num_over and _num_sandboxes(training) >= 4
        if not training.wait(is_there):
            raise SystemExit(f"{self._folder}: it ended before the {victim} was killed: {training.reason}")
        if victim.endswith(UPDATE):
            training.wait(lambda: _is_over(training))
        processes = training.processes(PROCESSES[victim.removesuffix(UPDATE)])
        if training.process.poll() is not None or not processes:
            raise SystemExit(f"{self._folder}: it ended before the {victim} was killed: {training.reason}")
        process = max(processes, key=psutil.Process.create_time)
        num_over, killed = len(training.steps), time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        if training.wait(lambda: len(training.steps) > num_over):
            return f"went on; its step was over after {time.monotonic() - killed:.0f} s | "
        return f"ended after {time.monotonic() - killed:.0f} s: {self._resume()} | {self.checkpoint}"

    def finish(self) -> None:
        """Raises `TimeoutError` if it hangs."""
        self._training.wait(lambda: False)
        if self._training.process.returncode:
            self.wrong.append(f"the last run failed: {self._training.reason}")
        self._check_end()
        num_ahead = NUM_PROMPTS * NUM_AHEAD[self._config]
        self.wrong += _missing(self._folder, self._num_steps, self._resumed_from, num_ahead)

    def abandon(self) -> None:
        self._training.kill()

    @property
    def checkpoint(self) -> int:
        """The step of the newest; 0: there is none yet."""
        file = self._folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(file.read_text() or 0) if file.exists() else 0

    def _start(self) -> Training:
        self._num_starts += 1
        return Training(self._folder, self._num_starts, self._num_steps, self._config)

    def _resume(self) -> str:
        """Why the run ended."""
        ended = self._training
        self._check_end()
        self._resumed_from.append(self.checkpoint)
        self._training = self._start()
        return ended.reason

    def _check_end(self) -> None:
        name, (before, *_) = f"start {self._num_starts}", [*self._resumed_from[-1:], 0]
        steps = self._training.steps
        if steps != list(range(before + 1, before + 1 + len(steps))):
            self.wrong.append(f"{name} did the steps {steps} after the checkpoint of {before}")
        if left := self._training.num_left():
            self.wrong.append(f"{name} left {left} processes behind")


def _num_sandboxes(training: Training) -> int:
    """Of local ones each is a child of its host."""
    num = 0
    for host in training.processes(PROCESSES["sandbox host"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            num += len(host.children())
    return num


def _is_over(training: Training) -> bool:
    """Whether the samples of the step have all been played."""
    for _ in range(QUIET_LOOKS):
        if _num_sandboxes(training):
            return False
        time.sleep(POLL_S)
    return True


def _missing(folder: Path, num_steps: int, checkpoints: list[int], num_ahead: int) -> list[str]:
    """What is wrong with the rows that were trained on. verl writes a step's after its checkpoint, so those of a
    checkpoint that a run ended with may be missing: then as many prompts are."""
    column = parquet.read_table(folder / "data" / "train.parquet")["reward_model"]
    prompts = [row["ground_truth"] for row in column.to_pylist()]
    dumps = {int(path.stem): path.read_text().splitlines() for path in (folder / "rows").glob("*.jsonl")}
    trained = {step: [json.loads(line)["gts"] for line in lines] for step, lines in dumps.items()}
    return check_rows(prompts, trained, num_steps, may_miss=checkpoints, num_ahead=num_ahead)


def check_rows(
    prompts: Iterable[str],
    trained: dict[int, list[str]],
    num_steps: int,
    *,
    may_miss: Iterable[int],
    num_ahead: int = 0,
) -> list[str]:
    """`trained` are the prompts of each step's rows, of which those of the steps `may_miss` may not be told.
    `num_ahead` of the prompts are for a step that is not trained any more."""
    untold = set(range(1, num_steps + 1)) - set(trained)
    wrong = [f"step {step} has no rows" for step in sorted(untold - set(may_miss))]
    rows = Counter((step, prompt) for step, names in trained.items() for prompt in names)
    steps = Counter(prompt for _, prompt in rows)
    uneven = {key: count for key, count in rows.items() if count != NUM_SAMPLES}
    wrong += [f"step {step}: {count} rows of {prompt}" for (step, prompt), count in uneven.items()]
    wrong += [f"{prompt} in {count} steps" for prompt, count in steps.items() if count > 1]
    num_missing = len(set(prompts) - set(steps))
    if num_missing != NUM_PROMPTS * len(untold) + num_ahead:
        wrong.append(f"{num_missing} prompts were never trained on")
    return wrong


def main() -> int:
    known = [name + moment for name in PROCESSES for moment in ("", UPDATE)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "victims", nargs="*", metavar="VICTIM", help=f"of: {', '.join(known)}; by default {', '.join(VICTIMS)}"
    )
    parser.add_argument("--config", choices=NUM_AHEAD, default="sync", help="of recipes/verl_cpu_toy")
    parser.add_argument("--out", type=Path, default=Path("runs/verl_failures"))
    options = parser.parse_args()
    if unknown := set(options.victims) - set(known):
        parser.error(f"no such victim: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    victims = options.victims or VICTIMS
    epoch = Epoch(
        options.out.resolve() / time.strftime("%Y%m%d-%H%M%S"), num_steps=len(victims) + 1, config=options.config
    )
    print("| killed | the run | resumed from step |\n|---|---|---|", flush=True)
    try:
        for victim in victims:
            print(f"| {victim} | {epoch.kill(victim)} |", flush=True)
        epoch.finish()
    except TimeoutError:
        epoch.wrong.append("it hung")
    finally:
        epoch.abandon()
    print(f"\nlost or wrong: {'; '.join(epoch.wrong) or 'nothing'}")
    return int(bool(epoch.wrong))


if __name__ == "__main__":
    sys.exit(main())
