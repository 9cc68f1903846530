"""The sweep of a Docker engine over a fake one that refuses at times."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from docker.errors import APIError, NotFound

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox import docker_engine
from thunder_rollout.sandbox.docker_engine import SESSION_LABEL, sweep_docker


class Refusal(APIError):
    def __init__(self, status: int) -> None:
        response = requests.Response()
        response.status_code = status
        super().__init__("refused", response)


class FakeApi:
    """Things by name, and what the engine answers to who lists or removes them, if not that it is done."""

    def __init__(self) -> None:
        self.things = {
            kind: {f"{kind}{i}": "old" for i in range(3)} | {f"{kind}-living": "living"}
            for kind in ("container", "image", "volume", "network")
        }
        self.answers: dict[str, Exception] = {}

    def _list(self, kind: str) -> list[dict[str, Any]]:
        if kind in self.answers:
            raise self.answers[kind]
        return [
            {"Id": name, "Name": name, "Labels": {SESSION_LABEL: session}}
            for name, session in self.things[kind].items()
        ]

    def _remove(self, kind: str, name: str) -> None:
        if name in self.answers:
            raise self.answers[name]
        del self.things[kind][name]

    def containers(self, **how: Any) -> list[dict[str, Any]]:
        return self._list("container")

    def images(self, **how: Any) -> list[dict[str, Any]]:
        return self._list("image")

    def volumes(self, **how: Any) -> dict[str, Any]:
        return {"Volumes": self._list("volume")}

    def networks(self, **how: Any) -> list[dict[str, Any]]:
        return self._list("network")

    def remove_container(self, name: str, **how: Any) -> None:
        self._remove("container", name)

    def remove_image(self, name: str, **how: Any) -> None:
        self._remove("image", name)

    def remove_volume(self, name: str, **how: Any) -> None:
        self._remove("volume", name)

    def remove_network(self, name: str) -> None:
        self._remove("network", name)

    def left(self) -> set[str]:
        return {name for things in self.things.values() for name in things if not name.endswith("-living")}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    api = FakeApi()

    class Client:
        def __init__(self, **how: Any) -> None:
            self.api = api

        def close(self) -> None: ...

    monkeypatch.setattr(docker_engine.docker, "DockerClient", Client)
    return api


def sweep_old() -> int:
    return sweep_docker(None, "r", lambda session: session == "old")


def test_a_sweep_takes_all_of_the_dead_and_nothing_else(api: FakeApi) -> None:
    assert sweep_old() == 12
    assert api.left() == set()
    assert all(f"{kind}-living" in things for kind, things in api.things.items())
    assert sweep_old() == 0


@pytest.mark.parametrize("refusal", [Refusal(500), requests.ConnectionError("reset"), TimeoutError()])
def test_what_the_engine_keeps_keeps_nothing_else(api: FakeApi, refusal: Exception) -> None:
    api.answers = {"container1": refusal, "image0": refusal, "volume": refusal}
    with pytest.raises(SandboxFailed, match=r"keeps 3 leftovers \(removed: 7\)"):
        sweep_old()
    assert api.left() == {"container1", "image0", "volume0", "volume1", "volume2"}
    api.answers = {}
    assert sweep_old() == 5


def test_what_is_gone_or_going_is_removed_and_an_image_in_use_is_not(api: FakeApi) -> None:
    api.answers = {"container0": Refusal(409), "container1": NotFound("gone"), "volume2": NotFound("gone")}
    assert sweep_old() == 12
    api.answers |= {"image0": Refusal(409)}
    api.things["image"]["image0"] = "old"
    with pytest.raises(SandboxFailed, match="keeps 1 leftovers"):
        sweep_old()
