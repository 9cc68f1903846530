"""What a lost cache costs: prefilling a mean context again, against a turn's share of decoding.

Measured on all engines at once, as in a cell, for each model once a run: prefill_cost.json.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from thunder_rollout.bench.plan import CellPlan
from thunder_rollout.bench.workload import mean_context_tokens
from thunder_rollout.engine.protocol import Engine, GenerateRequest, Generation, Sampling

FILE = "prefill_cost.json"
_REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCost:
    """Seconds of one engine. A turn's share is the time of decoding its output, divided by the turns that decode
    with it: `num_together` whose contexts fill the KV."""

    model: str
    context_tokens: int
    output_tokens: int
    num_together: int
    prefill_s: float
    decode_share_s: float

    @property
    def ratio(self) -> float:
        return self.prefill_s / self.decode_share_s


class PrefillCosts:
    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._costs = {cost.model: cost for cost in read_prefill_costs(folder)}
        self._measured: set[str] = set()

    async def measure(self, plan: CellPlan, engines: Mapping[str, Engine], *, vocab_size: int) -> None:
        """Once a model in the life of this object; what an earlier one measured is replaced."""
        model = plan.key.model
        if model in self._measured:
            return
        self._costs[model] = await measure_prefill_cost(plan, engines, vocab_size=vocab_size)
        self._measured.add(model)
        self._path.write_text(json.dumps([asdict(cost) for cost in self._costs.values()], indent=2) + "\n")


def read_prefill_costs(folder: Path) -> list[PrefillCost]:
    path = folder / FILE
    return [PrefillCost(**cost) for cost in json.loads(path.read_text())] if path.exists() else []


async def measure_prefill_cost(plan: CellPlan, engines: Mapping[str, Engine], *, vocab_size: int) -> PrefillCost:
    context_tokens = round(mean_context_tokens(plan.workload))
    output_tokens = plan.workload.output_tokens
    num_together = max(1, min(plan.smallest_tokens // (context_tokens + output_tokens), plan.engines[0].max_num_seqs))
    meters = [_Meter(name, engine, vocab_size, context_tokens) for name, engine in engines.items()]
    await asyncio.gather(*(meter.prefill_s() for meter in meters))  # the first one warms the engine up
    prefill = [await asyncio.gather(*(meter.prefill_s() for meter in meters)) for _ in range(_REPEATS)]
    decode = await asyncio.gather(*(meter.decode_s(num_together, output_tokens) for meter in meters))
    return PrefillCost(
        model=plan.key.model,
        context_tokens=context_tokens,
        output_tokens=output_tokens,
        num_together=num_together,
        prefill_s=statistics.median(map(statistics.fmean, prefill)),
        decode_share_s=statistics.fmean(decode) / num_together,
    )


class _Meter:
    def __init__(self, name: str, engine: Engine, vocab_size: int, context_tokens: int) -> None:
        self._name = name
        self._engine = engine
        self._rng = random.Random(name)
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens
        self._numbers = itertools.count()

    async def prefill_s(self) -> float:
        return (await self._generate(self._prompt(), 1)).prefill_s

    async def decode_s(self, num_turns: int, output_tokens: int) -> float:
        """Median seconds for a turn's output among `num_turns` whose prompts are cached."""
        prompts = [self._prompt() for _ in range(num_turns)]
        for prompt in prompts:
            await self._generate(prompt, 1)
        together = await asyncio.gather(*(self._generate(prompt, output_tokens) for prompt in prompts))
        return statistics.median(generation.decode_s for generation in together)

    def _prompt(self) -> list[int]:
        return self._rng.choices(range(self._vocab_size), k=self._context_tokens)

    async def _generate(self, prompt_ids: list[int], max_tokens: int) -> Generation:
        request = GenerateRequest(
            request_id=f"prefill-cost/{self._name}/{next(self._numbers)}",
            prompt_ids=prompt_ids,
            sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
        )
        return await self._engine.generate(request)
