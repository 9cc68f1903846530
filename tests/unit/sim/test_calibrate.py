"""Calibration finds the terms of an engine that has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from thunder_rollout.engine.config import EngineConfig
from thunder_rollout.engine.fake import FakeEngine
from thunder_rollout.engine.model import EngineTiming
from thunder_rollout.engine.virtual_time import run_in_virtual_time
from thunder_rollout.errors import ConfigError
from thunder_rollout.sim.calibrate import TERMS, Fit, Observation, calibrate, fit, write_profile
from thunder_rollout.sim.profiles import EngineProfile, read_profile

TIMING = EngineTiming(
    step_s=3e-3, prefill_token_s=5e-5, decode_turn_s=3e-4, context_token_s=4e-8, prefill_context_s=2e-9
)
ENGINE = EngineConfig(
    model="fake", kind="fake", kv_cache_tokens=51_200, max_model_len=8_192, max_num_batched_tokens=1024
)


async def measure() -> tuple[EngineProfile, Fit]:
    engines = [FakeEngine(ENGINE, timing=TIMING) for _ in range(2)]
    infos = [await engine.start() for engine in engines]
    try:
        return await calibrate(engines, infos[0], name="fake", max_batched_tokens=1024, vocab_size=1000, repeats=1)
    finally:
        for engine in engines:
            await engine.stop()


def test_it_finds_the_terms_of_the_model(tmp_path: Path) -> None:
    profile, found = run_in_virtual_time(measure())
    assert found.mean_error < 0.02
    for term in TERMS:
        assert getattr(profile, term) == pytest.approx(getattr(TIMING, term), rel=0.1), term
    write_profile(profile, found.notes(), tmp_path / "mine.yaml")
    again = read_profile(tmp_path / "mine.yaml")
    assert again.step_s == pytest.approx(profile.step_s, rel=1e-3)
    assert again.capacity_tokens == profile.capacity_tokens


def test_no_term_is_negative() -> None:
    observations = [
        Observation("x", (1.0, n, n * n, 0.0, n), 1e-3 + 1e-4 * n - 1e-9 * n * n) for n in range(10, 2000, 100)
    ]
    found = fit(observations)
    assert min(found.terms.values()) >= 0
    assert found.mean_error < 0.2


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(ConfigError, match="engine"):
        fit([Observation("x", (1.0, 1.0, 1.0, 0.0, 1.0), 1.0)])
