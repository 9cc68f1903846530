"""`thunder-rollout calibrate`: the step-time terms of a real engine, measured and fitted.

A step's time is linear in what it does (see `sim.profiles.EngineProfile`), so every measurement is one
equation: fresh prompts of several lengths give the prefill terms, several turns decoding at once over
several contexts give the others. The terms are the least-squares solution of the relative errors
with none below zero. It drives the Engine Protocol alone. Engines that share a machine slow one another
down: with `num_engines` so many do the same at the same time, and the profile is that of one among them.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from thunder_rollout.engine.factory import create_engine
from thunder_rollout.engine.protocol import Engine, EngineInfo, GenerateRequest, Generation, Sampling
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.errors import ConfigError
from thunder_rollout.sim.config import CalibrateConfig, SimulateConfig
from thunder_rollout.sim.live_fit import read_bench, scale_to_bench
from thunder_rollout.sim.profiles import EngineProfile, read_profile

PREFILL_TOKENS = (64, 256, 512, 1024, 2048, 4096, 8192, 16384)
DECODE_TURNS = (1, 2, 4, 8, 16, 32, 64)
DECODE_CONTEXTS = (256, 1024, 4096)
OUTPUT_TOKENS = 48
PREFILL_RUN_TOKENS = 8192  # prompts of one measurement, together
VOCAB_SIZE = 256  # ids below this exist in every vocabulary
TERMS = ("step_s", "prefill_token_s", "prefill_context_s", "decode_turn_s", "context_token_s")


@dataclass(frozen=True, slots=True)
class Observation:
    """`counts` of each of `TERMS` in what took `seconds`."""

    what: str
    counts: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    terms: dict[str, float]
    mean_error: float  # mean of |predicted - measured| / measured
    observations: tuple[Observation, ...]

    def notes(self) -> list[str]:
        """What was measured beside what the terms predict."""
        lines = ["Measured (predicted) seconds:"]
        for observation in self.observations:
            predicted = sum(n * self.terms[term] for n, term in zip(observation.counts, TERMS, strict=True))
            lines.append(f"  {observation.what}: {observation.seconds:.4f} ({predicted:.4f})")
        return lines


async def run_calibration(config: CalibrateConfig) -> str:
    """Measure the engine or take the given profile, scale it if live runs are given, and write it;
    returns what to tell the user."""
    cells = read_bench(Path(config.bench), config.model or "qwen2_3m") if config.bench is not None else None
    if config.profile is not None:
        profile, notes = read_profile(Path(config.profile)), list[str]()
    else:
        profile, notes = await _measured(config)
    if cells is not None:
        settings = SimulateConfig(
            sim_engine=profile, num_backends=config.num_engines, seeds=[0, 1], warmup_lives=0.3, measure_lives=0.5
        )
        profile = await asyncio.to_thread(scale_to_bench, cells, settings)
    write_profile(replace(profile, name=config.name), notes, Path(config.out))
    return f"{config.out}:\n{Path(config.out).read_text()}"


async def _measured(config: CalibrateConfig) -> tuple[EngineProfile, list[str]]:
    """The profile of engines started in this process, and what was measured."""
    with tempfile.TemporaryDirectory(prefix="thunder-calibrate-") as scratch:
        engine_config = config.engine
        if config.model is not None:
            model = await asyncio.to_thread(write_preset, config.model, Path(scratch) / config.model)
            engine_config = replace(engine_config, model=str(model.path))
        engines = [create_engine(engine_config) for _ in range(config.num_engines)]
        try:
            infos = await asyncio.gather(*(engine.start() for engine in engines))
            profile, found = await calibrate(
                engines,
                infos[0],
                name=config.name,
                max_batched_tokens=engine_config.max_num_batched_tokens,
                vocab_size=VOCAB_SIZE,
                repeats=config.repeats,
            )
        finally:
            await asyncio.gather(*(engine.stop() for engine in engines))
    return profile, found.notes()


async def calibrate(
    engines: Sequence[Engine], info: EngineInfo, *, name: str, max_batched_tokens: int, vocab_size: int, repeats: int
) -> tuple[EngineProfile, Fit]:
    """Measure started engines, all alike, that serve nobody else."""
    benches = [_Bench(engine, info, max_batched_tokens, vocab_size) for engine in engines]
    observations = [
        await _typical([partial(bench.prefill, n) for bench in benches], repeats) for n in benches[0].prefill_sizes()
    ]
    for num_turns, context in benches[0].decode_grid():
        prompts = await asyncio.gather(*(bench.cached_prompts(num_turns, context) for bench in benches))
        runs = [partial(bench.decode, cached) for bench, cached in zip(benches, prompts, strict=True)]
        observations.append(await _typical(runs, repeats))
    found = fit(observations)
    terms = found.terms
    profile = EngineProfile(
        name=name,
        source=(
            f"thunder-rollout calibrate, {len(engines)} engines at once, {len(observations)} measurements, "
            f"mean error {found.mean_error:.0%}"
        ),
        capacity_tokens=info.capacity_tokens,
        block_size=info.block_size,
        max_running=info.max_running,
        max_batched_tokens=max_batched_tokens,
        max_context_tokens=info.max_model_len,
        step_s=max(terms["step_s"], 1e-6),
        prefill_token_s=terms["prefill_token_s"],
        prefill_context_s=terms["prefill_context_s"],
        decode_turn_s=terms["decode_turn_s"],
        context_token_s=terms["context_token_s"],
        turn_overhead_s=await benches[0].overhead_s(repeats),
    )
    return profile, found


def fit(observations: list[Observation]) -> Fit:
    """Non-negative least squares of relative errors, by dropping the most negative term until none is."""
    seconds = np.array([observation.seconds for observation in observations])
    counts = np.array([observation.counts for observation in observations])
    if len(observations) < len(TERMS) or seconds.min() <= 0:
        raise ConfigError(
            f"engine: {len(observations)} usable measurements; raise engine.max_model_len or engine.kv_cache_tokens"
        )
    weighted: npt.NDArray[np.float64] = counts / seconds[:, None]
    kept = [column for column in range(len(TERMS)) if counts[:, column].any()]
    while True:
        scale = np.abs(weighted[:, kept]).max(axis=0)
        solution = np.linalg.lstsq(weighted[:, kept] / scale, np.ones(len(seconds)), rcond=None)[0] / scale
        if solution.min() >= 0:
            break
        kept.pop(int(np.argmin(solution * scale)))
    terms = dict.fromkeys(TERMS, 0.0) | {TERMS[c]: float(value) for c, value in zip(kept, solution, strict=True)}
    predicted = counts @ np.array([terms[term] for term in TERMS])
    error = float(np.mean(np.abs(predicted - seconds) / seconds))
    return Fit(terms=terms, mean_error=error, observations=tuple(observations))


def write_profile(profile: EngineProfile, notes: Sequence[str], path: Path) -> None:
    """As a config for conf/sim_engine/, with `notes` in its comments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {note}" for note in ("Written by `thunder-rollout calibrate`.", *notes)]
    values = {name: getattr(profile, name) for name in profile.__dataclass_fields__}
    values = {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in values.items()}
    path.write_text("\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False))


async def _typical(measures: Sequence[Callable[[], Awaitable[Observation]]], repeats: int) -> Observation:
    """Each engine's measure, all at the same time: the mean of their medians over `repeats`."""
    rounds = [await asyncio.gather(*(measure() for measure in measures)) for _ in range(repeats)]
    seconds = [statistics.median(one.seconds for one in engine) for engine in zip(*rounds, strict=True)]
    return replace(rounds[0][0], seconds=statistics.fmean(seconds))


class _Bench:
    def __init__(self, engine: Engine, info: EngineInfo, max_batched_tokens: int, vocab_size: int) -> None:
        self._engine = engine
        self._info = info
        self._chunk = max_batched_tokens
        self._vocab_size = vocab_size
        self._rng = random.Random(0)
        self._num_requests = 0

    def prefill_sizes(self) -> list[int]:
        return [n for n in PREFILL_TOKENS if n + 1 < min(self._info.max_model_len, self._info.capacity_tokens)]

    def decode_grid(self) -> list[tuple[int, int]]:
        """(turns, context) that fit the pool and the engine together."""
        return [
            (turns, context)
            for context in DECODE_CONTEXTS
            for turns in DECODE_TURNS
            if turns <= self._info.max_running
            and context + OUTPUT_TOKENS <= self._info.max_model_len
            and turns * (context + OUTPUT_TOKENS + self._info.block_size) <= self._info.capacity_tokens
        ]

    async def prefill(self, num_tokens: int) -> Observation:
        """Lone prompts, one after the other, for long enough that other engines are busy meanwhile."""
        count = max(1, PREFILL_RUN_TOKENS // num_tokens)
        counts, seconds = np.zeros(len(TERMS)), 0.0
        for _ in range(count):
            generation = await self._generate(self._prompt(num_tokens), 1)
            counts += self._prefill_counts(generation.cached_tokens, num_tokens)
            seconds += generation.prefill_s
        return Observation(f"prefill of {num_tokens}", tuple(float(n) for n in counts / count), seconds / count)

    def _prefill_counts(self, cached_tokens: int, num_tokens: int) -> npt.NDArray[np.float64]:
        starts = range(cached_tokens, num_tokens, self._chunk)
        ends = [min(start + self._chunk, num_tokens) for start in starts]
        pairs = sum((end - start) * (start + end) / 2 for start, end in zip(starts, ends, strict=True))
        return np.array([len(ends), num_tokens - cached_tokens, pairs, 0.0, sum(ends)], dtype=float)

    async def cached_prompts(self, num_turns: int, context: int) -> list[list[int]]:
        prompts = [self._prompt(context) for _ in range(num_turns)]
        for prompt in prompts:
            await self._generate(prompt, 1)
        return prompts

    async def decode(self, prompts: list[list[int]]) -> Observation:
        """The steps after the last first token of turns whose prompts are cached."""
        num_turns, context = len(prompts), len(prompts[0])
        generations = await asyncio.gather(*(self._generate(prompt, OUTPUT_TOKENS) for prompt in prompts))
        steps = OUTPUT_TOKENS - 1
        seconds = sorted(generation.decode_s for generation in generations)[num_turns // 2]
        contexts = steps * num_turns * (context + OUTPUT_TOKENS / 2)
        return Observation(
            f"{num_turns} turns decoding at {context}",
            (float(steps), 0.0, 0.0, float(steps * num_turns), contexts),
            seconds,
        )

    async def overhead_s(self, repeats: int) -> float:
        """What a caller waits beyond the engine's own account of a small turn."""
        loop = asyncio.get_running_loop()
        extra = []
        for _ in range(repeats):
            started = loop.time()
            generation = await self._generate(self._prompt(64), 2)
            inside = generation.queue_s + generation.prefill_s + generation.decode_s
            extra.append(loop.time() - started - inside)
        return max(0.0, min(extra))

    async def _generate(self, prompt_ids: list[int], max_tokens: int) -> Generation:
        self._num_requests += 1
        request = GenerateRequest(
            request_id=f"calibrate/{self._num_requests}",
            prompt_ids=prompt_ids,
            sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
        )
        return await self._engine.generate(request)

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._rng.randrange(self._vocab_size) for _ in range(num_tokens)]
