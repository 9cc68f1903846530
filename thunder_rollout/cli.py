"""`thunder-rollout`: a few subcommands, hydra overrides behind them.

Exit codes: 0 done, 1 the machinery failed (samples given up are tried again on resume), 2 the user must mend
something (printed without a traceback), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf

from thunder_rollout import __version__
from thunder_rollout.errors import ThunderError, UserError

T = TypeVar("T")

_STOPPED = 130


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script; always exits."""
    args, overrides = _parser().parse_known_args(argv)
    sys.argv = [f"thunder-rollout {args.command}", *overrides]
    sys.exit(_COMMANDS[args.command][1]())


def _parser() -> argparse.ArgumentParser:
    """`tasks to-verl` is the command `to-verl` of the group `tasks`."""
    parser = argparse.ArgumentParser(prog="thunder-rollout", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--version", action="version", version=f"thunder-rollout {__version__}")
    groups = {"": parser.add_subparsers(required=True, metavar="command")}
    for command, (text, _) in _COMMANDS.items():
        group, _, name = command.rpartition(" ")
        if group not in groups:
            about = groups[""].add_parser(group, help=f"{group} {name}: {text}")
            groups[group] = about.add_subparsers(required=True, metavar="command")
        groups[group].add_parser(name, help=text, add_help=False).set_defaults(command=command)
    return parser


def _rollout() -> int:
    from thunder_rollout.config import RolloutConfig
    from thunder_rollout.runtime.driver import prepare, run_rollout
    from thunder_rollout.runtime.store import choose_run

    def task(config: RolloutConfig, raw: DictConfig) -> int:
        config, tasks = prepare(config)
        raw.engine.model = config.engine.model  # a link may point elsewhere when the run is resumed
        store = choose_run(Path(config.runs_dir), config.name, OmegaConf.to_yaml(raw, resolve=True))
        settings: Any = OmegaConf.to_container(raw, resolve=True)
        try:
            summary = asyncio.run(_until_signal(run_rollout(config, tasks, store, settings)))
        except asyncio.CancelledError:
            print("stopped; the same command goes on where it stopped", file=sys.stderr)
            raise
        finally:
            store.close()
        _print_summary(summary, store.folder)
        return 0 if summary["complete"] else 1

    return _hydra_main("rollout", RolloutConfig, task)


def _bench() -> int:
    from thunder_rollout.bench.config import BenchConfig
    from thunder_rollout.bench.live import run_bench
    from thunder_rollout.bench.report import write_report

    def task(config: BenchConfig, raw: DictConfig) -> int:
        folder = Path(config.runs_dir) / config.plan.name
        try:
            failed = asyncio.run(_until_signal(run_bench(config, folder)))
        except asyncio.CancelledError:
            print("stopped; the same command goes on, bench-report shows what there is", file=sys.stderr)
            raise
        write_report(folder)
        for cell in failed:
            print(f"failed twice, the same command tries it again: {cell.key}", file=sys.stderr)
        return 1 if failed else 0

    return _hydra_main("bench", BenchConfig, task)


def _bench_report() -> int:
    from thunder_rollout.bench.config import BenchConfig
    from thunder_rollout.bench.report import write_report

    def task(config: BenchConfig, raw: DictConfig) -> int:
        write_report(Path(config.runs_dir) / config.plan.name)
        return 0

    return _hydra_main("bench", BenchConfig, task)


def _bench_core() -> int:
    from thunder_rollout.bench.config import BenchCoreConfig
    from thunder_rollout.bench.core import bench_core

    def task(config: BenchCoreConfig, raw: DictConfig) -> int:
        bench_core(config)
        return 0

    return _hydra_main("bench_core", BenchCoreConfig, task)


def _simulate() -> int:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from thunder_rollout.sim.config import SimulateConfig
    from thunder_rollout.sim.report import simulate

    def task(config: SimulateConfig, raw: DictConfig) -> int:
        job = HydraConfig.get()
        folder = Path(config.out_dir)
        if job.mode is RunMode.MULTIRUN:
            folder /= job.job.override_dirname or str(job.job.num)
        simulate(config, folder)
        print(f"written: {folder}")
        return 0

    return _hydra_main("simulate", SimulateConfig, task)


def _calibrate() -> int:
    from thunder_rollout.sim.calibrate import run_calibration
    from thunder_rollout.sim.config import CalibrateConfig

    def task(config: CalibrateConfig, raw: DictConfig) -> int:
        print(asyncio.run(_until_signal(run_calibration(config))))
        return 0

    return _hydra_main("calibrate", CalibrateConfig, task)


def _make_tasks() -> int:
    from thunder_rollout.runtime.make_tasks import MakeTasksConfig, print_report, run_make_tasks

    def task(config: MakeTasksConfig, raw: DictConfig) -> int:
        progress, path = asyncio.run(_until_signal(run_make_tasks(config)))
        print_report(progress)
        print(f"written: {len(progress.tasks)} tasks to {path}")
        return 0 if len(progress.tasks) == config.count else 1

    return _hydra_main("make_tasks", MakeTasksConfig, task)


def _to_verl() -> int:
    from thunder_rollout.tasks.to_verl import ToVerlConfig, write_verl_files

    def task(config: ToVerlConfig, raw: DictConfig) -> int:
        for path, num_rows in write_verl_files(config).items():
            print(f"written: {num_rows} tasks to {path}")
        return 0

    return _hydra_main("to_verl", ToVerlConfig, task)


def _hydra_main(name: str, cls: type[T], task: Callable[[T, DictConfig], int]) -> int:
    """Run `task` on `conf/<name>.yaml` under hydra (overrides, --multirun, --cfg job), with our errors as
    plain messages. Returns the worst exit code of the jobs; Ctrl-C ends them all."""
    from thunder_rollout.config import compose_config, conf_dir, to_typed, with_known_fields

    overrides = with_known_fields(cls, sys.argv[1:])
    sys.argv[1:] = overrides
    if not any(argument.startswith("-") for argument in overrides):  # hydra's own flags are hydra's to judge
        try:
            compose_config(name, overrides)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    worst = 0

    def guarded(raw: DictConfig) -> None:
        nonlocal worst
        try:
            worst = max(worst, task(to_typed(cls, raw), raw))
        except ThunderError as error:
            print(f"error: {error}", file=sys.stderr)
            worst = max(worst, 2 if isinstance(error, UserError) else 1)
        except asyncio.CancelledError:
            sys.exit(_STOPPED)

    hydra.main(version_base="1.3", config_path=str(conf_dir().resolve()), config_name=name)(guarded)()
    return worst


async def _until_signal(work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; SIGINT and SIGTERM cancel it once, a second signal ends the process."""
    job = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        print("stopping (once more to give up at once)", file=sys.stderr)
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)
            signal.signal(signum, lambda *_: os._exit(_STOPPED))
        job.cancel()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop)
    return await job


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    print(
        f"{summary['num_samples']}/{summary['num_expected']} samples, {summary['num_resolved']} resolved "
        f"({summary['resolved_rate']:.0%}), {summary['steps_per_min']:.0f} steps/min, "
        f"KV hits {summary['kv_hit_rate']:.0%}, {summary['sandbox_backend'] or 'no'} sandboxes, "
        f"{summary['wall_s']:.0f} s; failures: {summary['failures'] or 'none'}"
    )
    print(f"run folder: {folder}")


_COMMANDS: dict[str, tuple[str, Callable[[], int]]] = {
    "rollout": ("roll out tasks x samples; hydra overrides follow (e.g. rollout.n=8 task.count=32)", _rollout),
    "bench": ("compare policies on real engines with small KV pools", _bench),
    "bench-report": ("report.md, csv and plots from the bench.json of a bench (plan=full: of that one)", _bench_report),
    "bench-core": ("measure what the scheduler's decisions cost at the size of a fleet", _bench_core),
    "simulate": ("compare policies in virtual time, beside their bounds", _simulate),
    "make-tasks": ("inject bugs into a package and keep those that its tests notice, as tasks", _make_tasks),
    "tasks to-verl": ("tasks as parquet files for verl's trainer (task=file task.path=..., out=FOLDER)", _to_verl),
    "calibrate": ("measure an engine and write its profile for simulate", _calibrate),
}

if __name__ == "__main__":
    main()
