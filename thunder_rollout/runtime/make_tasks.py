"""`thunder-rollout make-tasks`: the task factory on this machine's sandboxes.

With Docker the package gets an image of its own, which must be where a rollout's engines find it
(push it to their registry); without, every task carries the repository along.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from thunder_rollout.observe.console import table_console
from thunder_rollout.sandbox.config import SandboxConfig, select_backend
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.images import TOY_IMAGE
from thunder_rollout.tasks.factory.config import FactoryConfig
from thunder_rollout.tasks.factory.factory import Progress, make_tasks
from thunder_rollout.tasks.factory.journal import Journal
from thunder_rollout.tasks.factory.package import WORKDIR, Package, load_package
from thunder_rollout.tasks.factory.suite import Place
from thunder_rollout.tasks.loaders import save_tasks
from thunder_rollout.tasks.repository import new_repository

_LINE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeTasksConfig(FactoryConfig):
    """`conf/make_tasks.yaml`."""

    sandbox: SandboxConfig = field(default_factory=SandboxConfig)


async def run_make_tasks(config: MakeTasksConfig) -> tuple[Progress, Path]:
    """Make the tasks and write their file; how it went, and where. Raises as `make_tasks` does."""
    package = await asyncio.to_thread(load_package, config)
    out = Path(config.out or f"runs/tasks/{package.name}-{package.version}.jsonl")
    place = await asyncio.to_thread(_place, package, config.sandbox)
    host = SandboxHost(config.sandbox, run=f"make-tasks-{os.getpid()}")
    try:
        await host.start([place.image])
        with Journal(out.with_suffix(".tried.jsonl"), _fingerprint(place, config)) as journal:
            progress = await make_tasks(place, config, host.fresh, journal, _Reporter(config.count))
    finally:
        await host.stop()
    save_tasks(progress.tasks, out)
    return progress, out


def print_report(progress: Progress, console: Console | None = None) -> None:
    console = table_console(console, 80)
    console.print(
        f"{progress.stable_tests} tests in {progress.suite_s:.1f} s; {progress.num_found} bugs found", highlight=False
    )
    table = Table()
    table.add_column("outcome")
    table.add_column("bugs", justify="right")
    for outcome, number in progress.outcomes.most_common():
        table.add_row(outcome, str(number))
    operators = Counter(str(task.extra["operator"]) for task in progress.tasks)
    table.add_section()
    for operator, number in operators.most_common():
        table.add_row(f"kept: {operator}", str(number))
    console.print(table)


def _place(package: Package, config: SandboxConfig) -> Place:
    """Blocking: it asks the Docker engine, and builds the package's image there."""
    if select_backend(config).backend == "local":
        return Place(package=package, image=TOY_IMAGE, built=False, limits=config.limits)
    from thunder_rollout.sandbox.docker_engine import DockerEngine
    from thunder_rollout.sandbox.package_image import ensure_package_image

    files = Place(package=package, image="", built=False).files({})
    tag = f"thunder-tasks/{package.name.lower()}:{package.version}-{_digest(files)[:8]}"
    engine = DockerEngine(config.docker_host)
    try:
        ensure_package_image(engine.client, tag, files, f"cd {WORKDIR} && {new_repository()}")
    finally:
        engine.close()
    return Place(package=package, image=tag, built=True, limits=config.limits)


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for path, content in sorted(files.items()):
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _fingerprint(place: Place, config: MakeTasksConfig) -> str:
    """What a bug's outcome depends on; `count` and the seed only choose which bugs are tried."""
    settings = asdict(config)
    chosen = {name: settings[name] for name in ("max_failed_share", "suite_timeout_s", "validate", "seed", "grading")}
    where = {"package": _digest(place.files(place.package.files)), "image": place.image, "limits": asdict(place.limits)}
    return json.dumps(where | chosen)


class _Reporter:
    """A line on stderr now and then."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._last_at = float("-inf")
        self._console = Console(stderr=True)

    def __call__(self, progress: Progress) -> None:
        done = len(progress.tasks) == self._count
        if time.monotonic() - self._last_at < _LINE_EVERY_S and not done:
            return
        self._last_at = time.monotonic()
        tried = sum(progress.outcomes.values())
        outcomes = "  ".join(f"{name} {number}" for name, number in progress.outcomes.most_common())
        line = f"tasks {len(progress.tasks)}/{self._count}  tried {tried} of {progress.num_found}  {outcomes}"
        self._console.print(line, highlight=False, soft_wrap=True)
