"""verl's own classes around a scripted server: its configuration, its server client, no Ray and no model."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from thunder_rollout.errors import InfrastructureFailure
from thunder_rollout.runtime.episode import EpisodePlayer, EpisodeSettings
from thunder_rollout.sandbox.fake import FakeSandbox
from thunder_rollout.sandbox.protocol import ExecResult, SandboxLimits, SandboxSpec
from thunder_rollout.tasks.task import Task
from thunder_rollout.verl_adapter.crew import Stage

VERSION = 7


@functools.cache
def verl_config(*overrides: str) -> DictConfig:
    """verl's whole configuration of `main_ppo`; nobody may change it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", ["actor_rollout_ref.rollout.name=vllm", *overrides])
    OmegaConf.set_readonly(config, True)
    return config


@dataclass
class Method:
    """A method of an actor's handle."""

    call: Callable[..., Any]

    async def remote(self, *args: Any, **kwargs: Any) -> Any:
        result = self.call(*args, **kwargs)
        return await result if isinstance(result, Awaitable) else result


@dataclass
class ScriptedServer:
    """Says one text after another, each closed by `end_id` unless cut by its limit; an exception in `texts` is
    raised instead. Keeps what it was asked."""

    encode: Callable[[str], list[int]]
    end_id: int
    texts: list[str | Exception]
    version: int = VERSION
    logprobs: bool = True
    prompts: list[list[int]] = field(default_factory=list)
    params: list[dict[str, Any]] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)

    def generate_now(self, **request: Any) -> TokenOutput:
        self.prompts.append(list(request["prompt_ids"]))
        self.params.append(dict(request["sampling_params"]))
        text = self.texts[len(self.prompts) - 1]
        if isinstance(text, Exception):
            raise text
        ids = [*self.encode(text), self.end_id][: request["sampling_params"]["max_tokens"]]
        self.said.append(ids)
        return TokenOutput(
            token_ids=ids,
            log_probs=[-0.25] * len(ids) if self.logprobs else None,
            stop_reason="completed",
            num_preempted=1,
            extra_fields={"global_steps": self.version, "num_cached_tokens": 4},
        )

    @property
    def generate(self) -> Method:
        return Method(self.generate_now)


@dataclass
class Notes:
    """Methods that are called without waiting for them."""

    name: str
    heard: list[tuple[str, ...]]

    def remote(self, *told: str) -> None:
        self.heard.append((self.name, *told))


class _ReleaseMethod:
    """Called without waiting for it."""

    def __init__(self, released: list[str | None]) -> None:
        self._released = released

    def remote(self, server_id: str, request_id: str | None = None) -> None:
        self._released.append(request_id)


@dataclass
class Balancer:
    """A load balancer's handle over one server."""

    server: ScriptedServer
    acquired: list[str] = field(default_factory=list)
    released: list[str | None] = field(default_factory=list)
    heard: list[tuple[str, ...]] | None = None  # None: it is verl's own, which hears of nothing
    grant: asyncio.Event = field(default_factory=asyncio.Event)  # set: requests are granted at once

    def __post_init__(self) -> None:
        self.grant.set()

    async def acquire(self, request_id: str) -> tuple[str, Any]:
        await self.grant.wait()
        self.acquired.append(request_id)
        return "server0", self.server

    def __getattr__(self, name: str) -> Any:
        match name:
            case "acquire_server":
                return Method(self.acquire)
            case "release_server":
                return _ReleaseMethod(self.released)
            case "require_acquire_fields":
                return Method(list)
            case "require_release_fields":
                return Method(lambda: ["request_id"])
            case "tool_started" | "program_ended" if self.heard is not None:
                return Notes(name, self.heard)
            case _:
                raise AttributeError(name)


def client_of(config: DictConfig, balancer: Balancer, cls: type[LLMServerClient] = LLMServerClient) -> LLMServerClient:
    return cls(config=config, load_balancer_handle=balancer)


def quiet(command: str) -> ExecResult:
    return ExecResult(exit_code=0, output=f"ran {command}", timed_out=False, took_s=0.5)


@dataclass
class FakeHosts:
    answer: Callable[[str], ExecResult] = quiet
    released: list[str] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)

    async def prepare(self, program: str, spec: SandboxSpec) -> float:
        self.prepared.append(program)
        return 0.0

    def sandbox(self, program: str, spec: SandboxSpec) -> FakeSandbox:
        return FakeSandbox(spec, self.answer)

    async def release(self, program: str) -> None:
        self.released.append(program)


@dataclass
class FakeStages:
    hosts: FakeHosts = field(default_factory=FakeHosts)
    failures: list[InfrastructureFailure] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    async def stage(self, task: Task) -> Stage:
        player = EpisodePlayer(EpisodeSettings(run="test", limits=SandboxLimits()), self.hosts)
        return Stage(hosts=self.hosts, player=player, backend="fake")

    def sample_started(self, task: Task) -> None:
        self.samples.append("started")

    def sample_finished(self, task: Task) -> None:
        self.samples.append("finished")

    def failed(self, failure: InfrastructureFailure) -> None:
        self.failures.append(failure)
