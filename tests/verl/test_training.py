"""Two real steps of verl's trainer with everything of ours plugged in, on the recipe's own configuration."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.support import verl_records

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "verl_cpu_toy"
NUM_PROMPTS, NUM_SAMPLES, NUM_STEPS = 4, 4, 2
NUM_UPDATES, NUM_STEPS_APART = 2, 4  # updates a step; played ahead, the first steps' rows are of the first weights
SETTINGS = {
    "data.train_batch_size": NUM_PROMPTS,
    "actor_rollout_ref.rollout.n": NUM_SAMPLES,
    "actor_rollout_ref.rollout.temperature": 1.3,  # so that no group is of one mind
    "actor_rollout_ref.actor.optim.lr": 0.001,
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
    "trainer.total_training_steps": NUM_STEPS,
    "trainer.val_before_train": False,
    "trainer.test_freq": -1,
    "trainer.v1.sampler.custom_sampler.path": "pkg://tests.support.verl_records",
    "trainer.v1.sampler.custom_sampler.name": "make_recording_sampler",
}


def train(folder: Path, config: str, settings: dict[str, Any]) -> Path:
    """The folder of a run: metrics, the engine's record and the rows that were trained on."""
    environment = os.environ | {
        "CONFIG": config,
        "RUN": str(folder),
        "PYTHON": sys.executable,
        "POLICY": str(ROOT / "recipes" / "tiny_policy" / "config.yaml"),  # other tests have built it
        "NUM_TRAIN": "32",
        "NUM_VALIDATION": "4",
        "PYTHONPATH": str(ROOT),
        "VERL_USE_EXTERNAL_MODULES": "tests.support.verl_records",
        "VERL_RECORDS": str(folder),
    }
    command = [str(RECIPE / "run_verl_cpu_toy.sh"), *(f"{name}={value}" for name, value in settings.items())]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    updates = {"actor_rollout_ref.actor.ppo_mini_batch_size": NUM_PROMPTS}
    return train(tmp_path_factory.mktemp("verl"), "sync", SETTINGS | updates)


@pytest.fixture(scope="module")
def trained_apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By a trainer whose rollout goes on meanwhile, and across updates of its weights."""
    updates = {
        "actor_rollout_ref.actor.ppo_mini_batch_size": NUM_PROMPTS // NUM_UPDATES,
        "trainer.v1.separate_async.parameter_sync_step": NUM_UPDATES,
        "trainer.total_training_steps": NUM_STEPS_APART,
    }
    return train(tmp_path_factory.mktemp("verl_apart"), "separate_async", SETTINGS | updates)


@pytest.mark.timeout(900)
def test_ids_mask_and_logprobs_of_every_row_are_the_engines(trained: Path) -> None:
    turns: dict[str, list[dict[str, Any]]] = {}
    for turn in verl_records.read(trained, "engine"):
        turns.setdefault(_key(turn["prompt_ids"], turn["token_ids"]), []).append(turn)
    rows = verl_records.read(trained, "rows")
    assert len(rows) == NUM_PROMPTS * NUM_SAMPLES * NUM_STEPS
    num_generated = 0
    for row in rows:
        assert len(row["responses"]) == len(row["response_mask"]) == len(row["rollout_log_probs"])
        for start, end in _generated(row["response_mask"]):
            prompt, token_ids = row["prompts"] + row["responses"][:start], row["responses"][start:end]
            same = turns[_key(prompt, token_ids)]  # the samples of a prompt may say the same
            turn = min(same, key=lambda turn: _distance(turn["logprobs"], row["rollout_log_probs"][start:end]))
            assert turn["version"] == row["step"] - 1
            assert _distance(turn["logprobs"], row["rollout_log_probs"][start:end]) < 1e-5
            same.remove(turn)
            num_generated += end - start
        context = [
            value for value, mask in zip(row["rollout_log_probs"], row["response_mask"], strict=True) if not mask
        ]
        assert not any(context)
    assert num_generated > 0
    assert not [turn for left in turns.values() for turn in left], "turns of the engine that no row has"


def test_the_policy_changes_and_the_engine_follows(trained: Path) -> None:
    """The actor computes each row's log-probabilities anew: only with the same weights are they the engine's."""
    steps = [json.loads(line)["data"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == NUM_STEPS
    assert any(step["actor/grad_norm"] > 0 for step in steps)
    for step in steps:
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.99
    assert {row["rm_scores"][-1] for row in verl_records.read(trained, "rows")} <= {0.0, 1.0}


@pytest.mark.timeout(900)
def test_rows_of_a_rollout_that_goes_on_meanwhile_are_the_engines(trained_apart: Path) -> None:
    """An update may cut a turn, which then goes on from the tokens it has: its pieces must make up the row's turn."""
    pieces: dict[str, list[dict[str, Any]]] = {}
    for piece in verl_records.read(trained_apart, "engine"):
        pieces.setdefault(json.dumps(piece["prompt_ids"]), []).append(piece)
    rows = verl_records.read(trained_apart, "rows")
    assert len(rows) == NUM_PROMPTS * NUM_SAMPLES * NUM_STEPS_APART
    versions = set()
    for row in rows:
        for start, end in _generated(row["response_mask"]):
            while start < end:
                piece = next(_begins(row, start, end, pieces))
                versions.add(piece["version"])
                start += len(piece["token_ids"])
    assert len(versions) > 1, "no row was played with updated weights"


def _begins(
    row: dict[str, Any], start: int, end: int, pieces: dict[str, list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """What the engine said from `start` on, of all that it was asked to go on from there."""
    for piece in pieces[json.dumps(row["prompts"] + row["responses"][:start])]:
        stop = start + len(piece["token_ids"])
        same = piece["token_ids"] == row["responses"][start:stop]
        if start < stop <= end and same and _distance(piece["logprobs"], row["rollout_log_probs"][start:stop]) < 1e-5:
            yield piece


def _generated(mask: list[int]) -> list[tuple[int, int]]:
    """The spans of ones."""
    spans, start = [], 0
    for value, run in groupby(mask):
        end = start + len(list(run))
        if value:
            spans.append((start, end))
        start = end
    return spans


def _key(prompt_ids: list[int], token_ids: list[int]) -> str:
    return json.dumps([prompt_ids, token_ids])


def _distance(one: list[float], other: list[float]) -> float:
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=math.inf)
