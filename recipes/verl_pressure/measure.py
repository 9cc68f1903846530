"""Is `timing_s/gen` shorter with `ProgramRouter` than with verl's own load balancer?

    python recipes/verl_pressure/measure.py [--quick] [--out runs/verl_pressure] [overrides of config.yaml]

verl's own agent loop manager, workers, client and two vLLM replicas on the CPU play scripted programs, `load` times as
many as their KV holds. Steps alternate between the two balancers over the same replicas (ABBA), both of a pair with
the same programs. Writes `steps.jsonl`, `steps.csv` and `report.md`; exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from thunder_rollout.bench.config import BenchConfig, WorkloadConfig
from thunder_rollout.bench.intervals import Interval, interval, paired_ratio
from thunder_rollout.bench.workload import Position, Script, longest_context_tokens, mean_context_tokens, script
from thunder_rollout.config import compose_config, conf_dir, to_typed
from thunder_rollout.errors import ConfigError, UserError

HERE = Path(__file__).parent
WORKLOAD = "short_tools"
VERL, ROUTER = BALANCERS = ("verl", "router")
MOST = 0.8  # of verl's time, where programs are more than the KV holds
QUICK = [
    "pressure.model=qwen2_3m",
    "pressure.num_turns=4",
    "pressure.loads=[{load:4.0,num_pairs:1},{load:0.5,num_pairs:1}]",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    load: float
    num_pairs: int

    def __post_init__(self) -> None:
        if self.load <= 0 or self.num_pairs < 1:
            raise ConfigError("pressure.loads: load must be > 0, num_pairs at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PressureConfig:
    """`pressure` of config.yaml."""

    seed: int
    loads: list[LoadPlan]
    model: str
    num_turns: int
    max_context_tokens: int
    router: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    load: float
    seed: int  # both steps of a pair have it
    balancer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One step. Hits are shares of the prompts' tokens, `infinite_kv_hit_rate` what a cache that forgets nothing would
    give; a turn's seconds are from its request to its last token. `router`: its own figures, by verl's names."""

    load: float
    seed: int
    balancer: str
    num_programs: int
    num_turns: int
    gen_s: float
    kv_hit_rate: float
    infinite_kv_hit_rate: float
    turn_p50_s: float
    turn_p95_s: float
    router: dict[str, float]


def planned_steps(config: PressureConfig) -> list[Step]:
    """Every other pair goes backwards, so that what drifts on the machine weighs on neither alone."""
    return [
        Step(load=plan.load, seed=config.seed + pair, balancer=balancer)
        for plan in config.loads
        for pair in range(plan.num_pairs)
        for balancer in (BALANCERS if pair % 2 == 0 else BALANCERS[::-1])
    ]


def workload_of(config: PressureConfig) -> WorkloadConfig:
    bench = to_typed(BenchConfig, compose_config("bench", []))
    return replace(
        bench.workload[WORKLOAD],
        name=WORKLOAD,
        num_turns=config.num_turns,
        max_context_tokens=config.max_context_tokens,
    )


def check_room(workload: WorkloadConfig, rollout: DictConfig, capacities: Sequence[int]) -> None:
    """Raises `ConfigError` where a program may grow beyond what verl or a replica bears."""
    longest = longest_context_tokens(workload)
    first = 2 * workload.prompt_tokens
    bounds = {
        "max_model_len": (longest, rollout.max_model_len),
        "response_length": (longest - 1, rollout.response_length),
        "prompt_length": (first, rollout.prompt_length),
        "engine_kwargs.vllm.num_gpu_blocks_override (in tokens)": (longest, min(capacities)),
    }
    for name, (needed, given) in bounds.items():
        if needed > given:
            raise ConfigError(
                f"actor_rollout_ref.rollout.{name}: {given} tokens, and a program may need {needed}; raise it, or "
                "lower pressure.num_turns or pressure.max_context_tokens"
            )


def scripts_of(workload: WorkloadConfig, step: Step, capacity_tokens: int, vocab_size: int) -> list[Script]:
    num_programs = max(1, round(step.load * capacity_tokens / mean_context_tokens(workload)))
    return [
        script(workload, Position(index, 0), seed=step.seed, vocab_size=vocab_size) for index in range(num_programs)
    ]


def row_of(step: Step, gen_s: float, programs: list[list[dict[str, float]]], router: dict[str, float]) -> Row:
    """`programs` are the turns of each. Raises `RuntimeError` where a first turn found a cache that was not empty."""
    if any(turns[0]["cached_tokens"] for turns in programs):
        raise RuntimeError("a program's first turn found tokens of the step before in the cache")
    turns = [turn for program in programs for turn in program]
    prompt_tokens = sum(turn["prompt_tokens"] for turn in turns)
    cuts_s = quantiles([turn["turn_s"] for turn in turns], n=20, method="inclusive")
    return Row(
        **asdict(step),
        num_programs=len(programs),
        num_turns=len(turns),
        gen_s=gen_s,
        kv_hit_rate=sum(turn["cached_tokens"] for turn in turns) / prompt_tokens,
        infinite_kv_hit_rate=sum(turn["known_tokens"] for turn in turns) / prompt_tokens,
        turn_p50_s=cuts_s[9],
        turn_p95_s=cuts_s[18],
        router=router,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The steps of one load; `ratio` is the router's time over verl's, paired by seed."""

    load: float
    rows: dict[str, list[Row]]
    gen_s: dict[str, Interval]
    ratio: Interval

    @property
    def is_met(self) -> bool:
        """Under pressure the router takes at most `MOST` of verl's time; else neither is told from the other."""
        if self.load > 1:
            return self.ratio.mean <= MOST
        verl, router = self.gen_s[VERL], self.gen_s[ROUTER]
        return not (router.low > verl.high or verl.low > router.high)


def compared(rows: Sequence[Row]) -> list[Compared]:
    """Of loads that have a whole pair; a step without its other is left out."""
    found = []
    for load in dict.fromkeys(row.load for row in rows):
        by_seed = {name: {r.seed: r for r in rows if (r.load, r.balancer) == (load, name)} for name in BALANCERS}
        seeds = by_seed[VERL].keys() & by_seed[ROUTER].keys()
        if not seeds:
            continue
        kept = {name: [by_seed[name][seed] for seed in sorted(seeds)] for name in BALANCERS}
        times = {name: {row.seed: row.gen_s for row in kept[name]} for name in BALANCERS}
        ratio = paired_ratio(times[ROUTER], times[VERL])
        assert ratio is not None
        gen_s = {name: interval(list(times[name].values())) for name in BALANCERS}
        found.append(Compared(load=load, rows=kept, gen_s=gen_s, ratio=ratio))
    return found


def table(rows: Sequence[Row]) -> str:
    columns = [
        "load",
        "programs",
        "turns",
        "balancer",
        "steps",
        "gen s",
        "router / verl",
        "KV hits",
        "of infinite KV",
        "turn p50 / p95 s",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in compared(rows):
        for name in BALANCERS:
            steps = one.rows[name]
            hits, infinite = _mean(steps, "kv_hit_rate"), _mean(steps, "infinite_kv_hit_rate")
            lines.append(
                f"| {one.load:g} | {steps[0].num_programs} | {_mean(steps, 'num_turns'):.0f} | `{name}` | {len(steps)} "
                f"| {one.gen_s[name].text(1)} | {one.ratio if name == ROUTER else ''} | {hits:.2f} "
                f"| {hits / infinite:.2f} | {_mean(steps, 'turn_p50_s'):.1f} / {_mean(steps, 'turn_p95_s'):.1f} |"
            )
    return "\n".join(lines)


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(getattr(row, name) for row in rows) / len(rows)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    figures = list(dict.fromkeys(name for row in rows for name in row.router))
    flat = [{**asdict(row), **row.router} for row in rows]
    names = [name for name in flat[0] if name != "router" and name not in figures]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *figures], extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(flat)


def read_config(overrides: Sequence[str]) -> tuple[PressureConfig, DictConfig]:
    """The recipe's own, and verl's without it."""
    with initialize_config_dir(str(HERE.resolve()), version_base=None):
        config: Any = compose("config", list(overrides))
    with open_dict(config):
        own = to_typed(PressureConfig, config.pop("pressure"))
        config.actor_rollout_ref.rollout.agent.agent_loop_config_path = str(HERE / "scripted_loop.yaml")
    return own, config


def measure(own: PressureConfig, config: DictConfig, out: Path) -> list[Row]:
    from verl_stack import started  # verl and vLLM take seconds to import

    from thunder_rollout.engine.random_model import write_preset

    rows: list[Row] = []
    workload = workload_of(own)
    with tempfile.TemporaryDirectory(prefix="thunder-pressure-") as scratch:
        model = write_preset(own.model, Path(scratch) / own.model)
        config.actor_rollout_ref.model.path = str(model.path)
        router_path = own.router or str(conf_dir() / "verl/thunder_router.yaml")
        with started(config, router_path) as stack, (out / "steps.jsonl").open("w") as file:
            capacities = stack.capacities()
            check_room(workload, config.actor_rollout_ref.rollout, capacities)
            for step in [*warm_up(own), *planned_steps(own)]:
                scripts = scripts_of(workload, step, sum(capacities), model.vocab_size)
                played = stack.play(step.balancer, scripts)
                row = row_of(step, played.gen_s, played.programs, played.router)
                print(
                    f"load {row.load:g} seed {row.seed} {row.balancer}: {row.num_programs} programs, {row.num_turns} "
                    f"turns, gen {row.gen_s:.1f} s, KV hits {row.kv_hit_rate:.2f}",
                    flush=True,
                )
                if step.seed >= own.seed:
                    rows.append(row)
                    file.write(json.dumps(asdict(row)) + "\n")
                    file.flush()
    return rows


def warm_up(config: PressureConfig) -> list[Step]:
    """A pair of the least load that does not count: what is loaded and compiled by the first turns."""
    load = min(plan.load for plan in config.loads)
    return [Step(load=load, seed=config.seed - 1, balancer=balancer) for balancer in BALANCERS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="whether it runs at all: a small model, a pair of steps")
    parser.add_argument("--out", type=Path, default=Path("runs/verl_pressure"))
    args, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        own, config = read_config([*(QUICK if args.quick else []), *overrides])
        args.out.mkdir(parents=True, exist_ok=True)
        rows = measure(own, config, args.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    write_csv(rows, args.out / "steps.csv")
    text = table(rows)
    (args.out / "report.md").write_text(text + "\n")
    print(text)
    return int(not all(one.is_met for one in compared(rows)))


if __name__ == "__main__":
    sys.exit(main())
