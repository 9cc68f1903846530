"""What a node pulls and keeps, by policy: real pulls from a registry on loopback into a fresh Docker engine.

    python recipes/image_cache/measure.py --folder /var/tmp/thunder-image-cache

Needs root, dockerd and docker-registry, about twice the images' size on the disk, and some minutes. Policies:
`known` (ours, told the order), `lru` (ours, told nothing) and `everything` (no budget). Writes a row for each to
FOLDER/table.json, prints the table, and exits with 1 where a claim of the README does not hold. FOLDER can be
deleted afterwards; a later run with the same images takes those that are there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import loopback

from thunder_rollout.sandbox.config import ImagesConfig
from thunder_rollout.sandbox.docker_engine import DockerEngine
from thunder_rollout.sandbox.docker_images import DockerImageEngine, blocks_bytes
from thunder_rollout.sandbox.image_bound import least_pulled_bytes
from thunder_rollout.sandbox.image_cache import Image, Layer
from thunder_rollout.sandbox.image_store import ImageStore

ROOT = Path(__file__).resolve().parents[2]
MB = 10**6
POLICIES = ("everything", "lru", "known")
BUDGET_SHARE = 0.2
NUM_FAMILIES = 8
SAMPLE_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    policy: str
    pulled_bytes: int  # by the registry's log
    peak_bytes: int  # of the engine's whole data folder, over the empty engine's
    num_samples: int
    num_over_budget: int
    wait_s: float  # that tasks waited for their image, in all
    wall_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=2, help="tasks at a time")
    parser.add_argument("--task-s", type=float, default=0.5, help="how long a task holds its image")
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes; 1: images of 50 to 130 MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    options = parser.parse_args()
    layers = plan_images(options.images, options.scale, options.seed)
    rng = random.Random(options.seed)
    order = [name for _ in range(options.epochs) for name in rng.sample(sorted(layers), len(layers))]
    results = options.folder / "table.json"
    rows = json.loads(results.read_text()) if results.exists() else {}
    with loopback.LoopbackRegistry(options.folder / "registry") as registry:
        images = push_all(registry.address, layers, options.folder / "made.json")
        total_bytes = sum({x.key: x.disk_bytes for image in images.values() for x in image.layers}.values())
        budget_bytes = int(total_bytes * BUDGET_SHARE)
        for policy in options.policies:
            row = measure(policy, registry, order, budget_bytes, options)
            rows[policy] = asdict(row)
            results.write_text(json.dumps(rows, indent=2))
    bound_bytes = least_pulled_bytes([images[name] for name in order], budget_bytes)
    print(f"{len(layers)} images, {len(order)} tasks, {options.concurrency} at a time")
    print(f"all images {total_bytes / MB:.0f} MB, budget {budget_bytes / MB:.0f} MB")
    print(f"least that any cache could pull: {bound_bytes / MB:.0f} MB\n")
    return report({name: Row(**row) for name, row in rows.items()}, bound_bytes)


def plan_images(num_images: int, scale: float, seed: int) -> dict[str, list[tuple[str, int]]]:
    """Of each image its layers' names and sizes, the first shared by its family."""
    rng = random.Random(f"images {seed}")
    size = lambda low, high: int(rng.randint(low, high) * MB * scale)
    bases = [(f"base{i}", size(30, 60)) for i in range(NUM_FAMILIES)]
    return {
        f"task{i:03d}": [
            bases[i % NUM_FAMILIES],
            (f"task{i:03d}a", size(10, 35)),
            (f"task{i:03d}b", size(10, 35)),
        ]
        for i in range(num_images)
    }


def push_all(registry: str, layers: dict[str, list[tuple[str, int]]], made: Path) -> dict[str, Image]:
    """Push what is not there yet; each image as the bound counts it (unpacked is as big as packed)."""
    there: dict[str, list[list[object]]] = json.loads(made.read_text()) if made.exists() else {}
    for name, parts in layers.items():
        if [part[:2] for part in there.get(name, [])] == [list(part) for part in parts]:
            continue
        packed = [loopback.make_layer(key, num_bytes) for key, num_bytes in parts]
        loopback.push(registry, name, packed)
        there[name] = [[*part, len(layer.packed)] for part, layer in zip(parts, packed, strict=True)]
        made.write_text(json.dumps(there))
    return {
        name: Image(
            name=name,
            layers=tuple(Layer(key=str(key), pull_bytes=int(n), disk_bytes=int(n)) for key, _, n in there[name]),
        )
        for name in layers
    }


def measure(
    policy: str, registry: loopback.LoopbackRegistry, order: list[str], budget_bytes: int, options: argparse.Namespace
) -> Row:
    names = [f"{registry.address}/{name}:latest" for name in order]
    since = registry.log_size()
    with fresh_engine(options.folder / f"engine-{policy}") as (address, data):
        empty_bytes = blocks_bytes(data)
        began_s = time.monotonic()
        used, wait_s = asyncio.run(_run(policy, address, data, names, budget_bytes, options))
        wall_s = time.monotonic() - began_s
    return Row(
        policy=policy,
        pulled_bytes=registry.sent_bytes(since),
        peak_bytes=max(used) - empty_bytes,
        num_samples=len(used),
        num_over_budget=sum(now - empty_bytes > budget_bytes for now in used),
        wait_s=wait_s,
        wall_s=wall_s,
    )


async def _run(
    policy: str, address: str, data: Path, names: list[str], budget_bytes: int, options: argparse.Namespace
) -> tuple[list[int], float]:
    engine = DockerEngine(address)
    config = ImagesConfig(budget_bytes=None if policy == "everything" else budget_bytes)
    store = ImageStore(await asyncio.to_thread(DockerImageEngine, engine), config)
    await store.start()
    used: list[int] = []
    slots = asyncio.Semaphore(options.concurrency)

    async def sample_disk() -> None:
        while True:
            used.append(await asyncio.to_thread(blocks_bytes, data))
            await asyncio.sleep(SAMPLE_EVERY_S)

    async def run_task(name: str) -> None:
        async with store.lease(name):
            await asyncio.sleep(options.task_s)
        store.finished(name)
        slots.release()

    sampler = asyncio.create_task(sample_disk())
    try:
        if policy == "known":
            store.expect(names)
        async with asyncio.TaskGroup() as tasks:
            for name in names:
                await slots.acquire()
                if policy == "known":
                    store.started(name)
                tasks.create_task(run_task(name))
    finally:
        sampler.cancel()
        await store.stop()
        engine.close()
    return used, store.stats().wait_s


@contextmanager
def fresh_engine(folder: Path) -> Iterator[tuple[str, Path]]:
    """An engine with no image, gone with all it holds at the end: its address and its data."""
    shutil.rmtree(folder, ignore_errors=True)
    scripts = ROOT / "launch" / "docker"
    said = subprocess.run([scripts / "start-dockerd.sh", folder], check=True, stdout=subprocess.PIPE, text=True)
    try:
        yield said.stdout.strip().partition("=")[2], folder / "data"
    finally:
        subprocess.run([scripts / "stop-dockerd.sh", folder], check=True)
        shutil.rmtree(folder)


def report(rows: dict[str, Row], bound_bytes: float) -> int:
    print("| policy | MB pulled | of the bound | peak MB on disk | samples over budget | s waited | s in all |")
    print("|---|---|---|---|---|---|---|")
    for row in rows.values():
        over = "no budget" if row.policy == "everything" else f"{row.num_over_budget} of {row.num_samples}"
        print(
            f"| {row.policy} | {row.pulled_bytes / MB:.0f} | {row.pulled_bytes / bound_bytes:.2f} "
            f"| {row.peak_bytes / MB:.0f} | {over} | {row.wait_s:.0f} | {row.wall_s:.0f} |"
        )
    if set(rows) != set(POLICIES):
        return 0
    known, lru, everything = rows["known"], rows["lru"], rows["everything"]
    claims = {
        "the budget is never exceeded": not known.num_over_budget and not lru.num_over_budget,
        "at most 1.25x the bound": known.pulled_bytes <= 1.25 * bound_bytes,
        "fewer bytes than LRU": known.pulled_bytes < lru.pulled_bytes,
        "peak disk at least 4.2x below keeping everything": known.peak_bytes * 4.2 <= everything.peak_bytes,
    }
    print(f"\npeak disk: {everything.peak_bytes / known.peak_bytes:.2f}x below keeping everything")
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    assert os.geteuid() == 0, "needs root: it starts Docker engines"
    sys.exit(main())
