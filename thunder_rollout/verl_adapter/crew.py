"""What the agent loops of one process share: the model's client and chat, and where episodes are played."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.errors import ConfigError, InfrastructureFailure, SandboxFailed
from thunder_rollout.runtime.episode import EpisodePlayer, EpisodeSettings, SandboxSource
from thunder_rollout.sandbox.protocol import SandboxSpec
from thunder_rollout.sandbox.remote import RemoteSandboxHosts
from thunder_rollout.tasks.task import Task
from thunder_rollout.verl_adapter.client import RoutedClient
from thunder_rollout.verl_adapter.hub import RemoteHub
from thunder_rollout.verl_adapter.settings import SweSettings
from thunder_rollout.verl_adapter.versions import require_tested_verl

RETRY_PAUSE_S = 5.0


class SandboxHosts(SandboxSource, Protocol):
    async def prepare(self, program: str, spec: SandboxSpec) -> float:
        """Start the program's sandbox; the seconds it took. Raises `SandboxFailed`, as whoever uses it then hears."""

    async def release(self, program: str) -> None:
        """Give up the program's sandbox, if it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Sandbox hosts that run, and the player on them. `backend` is docker or local."""

    hosts: SandboxHosts
    player: EpisodePlayer
    backend: str


class Stages(Protocol):
    async def stage(self, task: Task) -> Stage:
        """The one there is, or a new one, fit for `task`. Raises `ConfigError`, `SandboxFailed`."""

    def sample_started(self, task: Task) -> None: ...

    def sample_finished(self, task: Task) -> None: ...

    def failed(self, failure: InfrastructureFailure) -> None:
        """An attempt at an episode failed so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """`retry_pause_s` follows each attempt that the machinery failed, the last one too: hosts are up again by then,
    and a dead replica is known to the trainer before the samples it had are given up."""

    settings: SweSettings
    client: RoutedClient
    chat: ChatFormat
    stages: Stages
    retry_pause_s: float = RETRY_PAUSE_S


class HubStages:
    """On the hosts of the job's hub."""

    def __init__(self, settings: SweSettings) -> None:
        self._settings = settings
        self._hub: RemoteHub | None = None
        self._early_hints: list[Callable[[RemoteHub], None]] = []  # of the time before there was a hub
        self._stage: Stage | None = None
        self._setting_up = asyncio.Lock()

    async def stage(self, task: Task) -> Stage:
        async with self._setting_up:
            if self._stage is None:
                self._stage = await self._set_up(task.image)
            stage = self._stage
        if stage.backend == "local" and not task.self_contained:
            raise ConfigError(
                f"settings.sandbox.backend: task {task.instance_id} needs its Docker image, and no Docker engine is "
                "used; start Docker on every node"
            )
        return stage

    def sample_started(self, task: Task) -> None:
        self._tell(lambda hub: hub.sample_started(task.image))

    def sample_finished(self, task: Task) -> None:
        self._tell(lambda hub: hub.sample_finished(task.image))

    def failed(self, failure: InfrastructureFailure) -> None:
        self._tell(lambda hub: hub.count_failure(failure.kind))
        if lost_its_sandbox(failure):
            self._stage = None  # the hosts may be gone, and others by now

    async def _set_up(self, image: str) -> Stage:
        settings = self._settings
        if self._hub is None:
            self._meet(await asyncio.to_thread(RemoteHub, settings.sandbox))
        assert self._hub is not None
        fleet = await self._hub.fleet([image])
        hosts = RemoteSandboxHosts(fleet.handles)
        episodes = EpisodeSettings(
            run=fleet.run,
            limits=settings.sandbox.limits,
            grading=settings.grading,
            grading_attempts=settings.max_attempts,
        )
        return Stage(hosts=hosts, player=EpisodePlayer(episodes, hosts), backend=fleet.backend)

    def _meet(self, hub: RemoteHub) -> None:
        self._hub = hub
        for hint in self._early_hints:
            hint(hub)
        self._early_hints.clear()

    def _tell(self, hint: Callable[[RemoteHub], None]) -> None:
        if self._hub is None:
            self._early_hints.append(hint)
        else:
            hint(self._hub)


def lost_its_sandbox(failure: InfrastructureFailure) -> bool:
    """The agent's, or the grader's."""
    return isinstance(failure, SandboxFailed) or isinstance(failure.__cause__, SandboxFailed)


def make_crew(settings: SweSettings, client: Any, tokenizer: Any) -> Crew:
    """`client` is verl's server client. Raises `UnsupportedVerl`."""
    require_tested_verl()
    return Crew(settings=settings, client=RoutedClient(client), chat=ChatFormat(tokenizer), stages=HubStages(settings))
