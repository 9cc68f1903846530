"""Images from a real registry on loopback, with a password, into a real engine."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from thunder_rollout.errors import ConfigError
from thunder_rollout.sandbox.config import ImagesConfig
from thunder_rollout.sandbox.docker_engine import DockerEngine
from thunder_rollout.sandbox.docker_images import DockerImageEngine
from thunder_rollout.sandbox.image_engine import PullFailed
from thunder_rollout.sandbox.image_store import ImageStore

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "image_cache"))
import loopback

MB = 10**6
# "open sesame"
HTPASSWD = "ali:$2b$04$UFX4VLJyzGwOHnKMfE5jkOsxGyQDsEAwFIAJLgqaqG7DL4lr4J5xa\n"
LOGIN = ("ali", "open sesame")
NAMES = [f"test{os.getpid()}/i{i}" for i in range(4)]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback.LoopbackRegistry]:
    if shutil.which("docker-registry") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no docker-registry: apt-get install docker-registry")
    with loopback.LoopbackRegistry(tmp_path_factory.mktemp("registry"), HTPASSWD) as registry:
        base = loopback.make_layer("base", 2 * MB)
        for name in NAMES:
            loopback.push(registry.address, name, [base, loopback.make_layer(name.replace("/", "-"), MB)], LOGIN)
        yield registry


@pytest.fixture
def login(registry: loopback.LoopbackRegistry, tmp_path: Path) -> str:
    auth = base64.b64encode(":".join(LOGIN).encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": auth}}}))
    return str(tmp_path / "config.json")


@pytest.fixture
def names(registry: loopback.LoopbackRegistry) -> Iterator[list[str]]:
    names = [f"{registry.address}/{name}:latest" for name in NAMES]
    yield names
    engine = DockerEngine()
    images = DockerImageEngine(engine)
    for name in names:
        images.remove(name)
    engine.close()


@pytest.fixture
def engine() -> Iterator[DockerEngine]:
    engine = DockerEngine()
    yield engine
    engine.close()


async def test_samples_images_come_and_go_within_the_budget(engine: DockerEngine, names: list[str], login: str) -> None:
    images = DockerImageEngine(engine, login)
    there_bytes = await _held_bytes(images)
    budget_bytes = there_bytes + 5_800_000  # two of them, and what it takes to unpack the second
    store = ImageStore(images, ImagesConfig(budget_bytes=budget_bytes, prefetch=1))
    await store.start()
    try:
        store.expect([*names, *names])
        for name in [*names, *names]:
            store.started(name)
            async with store.lease(name):
                assert images.find(name) is not None
                assert store.stats().held_bytes <= budget_bytes
            store.finished(name)
        assert store.stats().num_pulls >= len(names)
        assert store.stats().num_evictions >= len(names) - 2
    finally:
        await store.stop()


async def _held_bytes(images: DockerImageEngine) -> int:
    store = ImageStore(images, ImagesConfig(prefetch=0))
    await store.start()
    await store.stop()
    return store.stats().held_bytes


def test_what_an_image_weighs_is_known_before_it_is_pulled(engine: DockerEngine, names: list[str], login: str) -> None:
    images = DockerImageEngine(engine, login)
    before = images.describe(names[0])
    images.pull(names[0], lambda progress: None)
    found = images.find(names[0])
    assert found is not None and not found.fixed
    assert [layer.key for layer in found.image.layers] == [layer.key for layer in before.layers]
    for told, real in zip(before.layers, found.image.layers, strict=True):
        assert 0.8 * told.disk_bytes < real.disk_bytes <= told.disk_bytes


def test_a_pull_tells_its_progress(engine: DockerEngine, names: list[str], login: str) -> None:
    images = DockerImageEngine(engine, login)
    seen = []
    images.pull(names[1], lambda progress: seen.append((progress.pulled_bytes, progress.total_bytes)))
    assert seen[-1][0] == seen[-1][1] >= MB


def test_without_a_login_it_says_so_and_is_not_tried_again(
    engine: DockerEngine, names: list[str], tmp_path: Path
) -> None:
    (tmp_path / "empty.json").write_text("{}")
    images = DockerImageEngine(engine, str(tmp_path / "empty.json"))
    for call in (lambda: images.describe(names[2]), lambda: images.pull(names[2], lambda progress: None)):
        with pytest.raises(PullFailed, match="docker_config") as caught:
            call()
        assert not caught.value.transient


def test_a_registry_that_is_not_there_may_come_back(engine: DockerEngine) -> None:
    images = DockerImageEngine(engine)
    for call in (
        lambda: images.describe("localhost:1/no-such-image:1"),
        lambda: images.pull("localhost:1/no-such-image:1", lambda progress: None),
    ):
        with pytest.raises(PullFailed) as caught:
            call()
        assert caught.value.transient


def test_a_docker_config_that_is_not_there_names_its_field(engine: DockerEngine) -> None:
    with pytest.raises(ConfigError, match=r"sandbox\.images\.docker_config"):
        DockerImageEngine(engine, "/no/such/config.json")


@pytest.mark.skipif(os.geteuid() != 0, reason="the recipe starts a Docker engine of its own, as root")
def test_the_recipe_measures_what_a_disk_takes(registry: loopback.LoopbackRegistry) -> None:
    script = Path(loopback.__file__).with_name("measure.py")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # the path of a socket must be short
        argv = [sys.executable, script, "--folder", folder, "--images", "24", "--scale", "0.05", "--task-s", "0"]
        argv += ["--policies", "known", "--epochs", "1"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        row = json.loads((Path(folder) / "table.json").read_text())["known"]
    assert row["num_over_budget"] == 0
    assert row["pulled_bytes"] > 24 * 2 * MB
