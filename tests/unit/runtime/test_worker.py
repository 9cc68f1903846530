"""A whole sample on scripted engine and real local sandboxes: what overlaps what, and what is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.unit.agent.conftest import byte_tokenizer
from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.core.config import SchedulerConfig
from thunder_rollout.core.events import BackendUp
from thunder_rollout.engine.protocol import GenerateRequest, Generation, Sampling
from thunder_rollout.runtime.client import LocalScheduler
from thunder_rollout.runtime.service import SchedulerService
from thunder_rollout.runtime.store import RunStore, SampleKey
from thunder_rollout.runtime.worker import RolloutWorker, SampleOutcome, WorkerConfig
from thunder_rollout.sandbox import shell
from thunder_rollout.sandbox.config import SandboxConfig
from thunder_rollout.sandbox.host import SandboxHost
from thunder_rollout.sandbox.local import local_unavailable
from thunder_rollout.sandbox.protocol import ExecResult, SandboxLimits, SandboxSpec
from thunder_rollout.tasks.toy import generate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(local_unavailable()), reason=local_unavailable() or ""),
]
SETUP_S = 1.0
TURN_S = 0.5
EASY = generate(seed=0, count=1, difficulty="easy")[0]
GRADER = f"{EASY.instance_id}#0.0/grade0"
TASK = replace(EASY, setup=f"{EASY.setup}; sleep {SETUP_S}")


@dataclass
class HostSandbox:
    """A program's sandbox on a `SandboxHost` in this process."""

    host: SandboxHost
    program: str
    spec: SandboxSpec
    began: dict[str, float]

    async def start(self) -> None:
        self.began.setdefault(self.program, time.monotonic())
        await self.host.acquire(self.program, self.spec)

    async def exec(self, command: str, *, timeout_s: float) -> ExecResult:
        return await self.host.exec(self.program, command, timeout_s=timeout_s)

    async def read_file(self, path: str) -> bytes:
        return await self.host.read_file(self.program, path)

    async def write_file(self, path: str, content: bytes) -> None:
        await self.host.write_file(self.program, path, content)

    async def diff(self, base_commit: str) -> bytes:
        return await self.host.diff(self.program, base_commit)

    async def clear(self) -> None:
        await self.host.clear(self.program)

    async def stop(self) -> None:
        await self.host.release(self.program)


@dataclass
class Sandboxes:
    host: SandboxHost
    began: dict[str, float] = field(default_factory=dict)

    def sandbox(self, program: str, spec: SandboxSpec) -> HostSandbox:
        return HostSandbox(self.host, program, spec, self.began)


@dataclass
class ScriptedEngine:
    """Says one text a turn."""

    texts: list[bytes]
    ended: list[float] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> Generation:
        await asyncio.sleep(TURN_S)
        self.ended.append(time.monotonic())
        ids = TOKENIZER.encode(self.texts[len(self.ended) - 1].decode(), add_special_tokens=False)
        return Generation(
            token_ids=ids, logprobs=[0.0] * len(ids), finish_reason="stop", prompt_tokens=len(request.prompt_ids),
            cached_tokens=0, queue_s=0.0, prefill_s=0.0, decode_s=TURN_S,
        )  # fmt: skip


TOKENIZER = byte_tokenizer()


def command(text: str) -> bytes:
    return f"```bash\n{text}\n```<|im_end|>".encode()


@pytest.fixture
async def host() -> AsyncIterator[SandboxHost]:
    host = SandboxHost(SandboxConfig(backend="local"), run="test-worker")
    await host.start()
    yield host
    assert host.stats().num_running == host.stats().num_starting == 0
    await host.stop()


async def play(
    host: SandboxHost, folder: Path, texts: list[bytes], max_turns: int, earlier_turns: tuple[int, ...] = ()
) -> tuple[SampleOutcome, RunStore, Sandboxes, ScriptedEngine]:
    service = SchedulerService(SchedulerConfig(), sandboxes=host)
    service.handle(BackendUp(backend="e", generation=0, capacity_tokens=100_000, max_running=8))
    sandboxes, engine = Sandboxes(host), ScriptedEngine(texts)
    config = WorkerConfig(
        run="test-worker", model="m", agent=AgentConfig(max_turns=max_turns), sampling=Sampling(max_tokens=1),
        max_model_len=50_000, limits=SandboxLimits(), sandbox_backend="local",
    )  # fmt: skip
    store = RunStore(folder)
    store.open("{}")
    worker = RolloutWorker("w", config, ChatFormat(TOKENIZER), LocalScheduler(service), {"e": engine}, sandboxes, store)
    worker._player.turns_of_episodes.extend(earlier_turns)
    outcome = await worker.run(TASK, SampleKey(TASK.instance_id, 0), 0)
    await service.stop()
    return outcome, store, sandboxes, engine


async def test_the_grader_starts_beside_the_last_turn_an_agent_may_have(host: SandboxHost, tmp_path: Path) -> None:
    texts = [command("echo x > new.txt"), command("echo y > new.txt")]
    outcome, store, sandboxes, engine = await play(host, tmp_path, texts, max_turns=2)
    assert (outcome.num_turns, outcome.reward) == (2, 0.0)
    assert sandboxes.began[GRADER] < engine.ended[-1] - TURN_S / 2
    print(f"graded in {graded_in_s(store):.2f} s")


async def test_the_grader_starts_when_the_agent_submits_and_not_before(host: SandboxHost, tmp_path: Path) -> None:
    fix = f"git apply <<'EOF'\n{TASK.patch}EOF"
    outcome, store, sandboxes, engine = await play(host, tmp_path, [command(fix), command("submit")], max_turns=9)
    assert outcome.resolved
    assert engine.ended[-1] < sandboxes.began[GRADER] < engine.ended[-1] + 0.5
    print(f"graded in {graded_in_s(store):.2f} s")


async def test_the_grader_starts_a_turn_before_half_of_the_episodes_ended(host: SandboxHost, tmp_path: Path) -> None:
    texts = [command("echo x > new.txt"), command("ls"), command("ls"), command("submit")]
    _, _, sandboxes, engine = await play(host, tmp_path, texts, max_turns=9, earlier_turns=(2, 3, 9, 3))
    assert engine.ended[1] < sandboxes.began[GRADER] < engine.ended[2]


async def test_no_grader_starts_before_its_programs_own_sandbox(host: SandboxHost, tmp_path: Path) -> None:
    texts = [b"no command<|im_end|>", command("ls"), command("ls"), command("submit")]
    _, _, sandboxes, engine = await play(host, tmp_path, texts, max_turns=9, earlier_turns=(2, 2, 2, 2))
    assert engine.ended[1] < sandboxes.began[GRADER] < engine.ended[2]


async def test_a_grader_that_began_for_an_empty_patch_is_stopped(host: SandboxHost, tmp_path: Path) -> None:
    outcome, *_ = await play(host, tmp_path, [command("ls"), command("ls")], max_turns=2)
    assert outcome.reward == 0.0


async def test_changes_that_are_no_patch_are_the_agents_failure(
    host: SandboxHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "MAX_FILE_BYTES", 10_000)
    outcome, store, *_ = await play(host, tmp_path, [command("head -c 20000 /dev/urandom > new")], max_turns=1)
    assert (outcome.resolved, outcome.reward) == (False, 0.0)
    (row,) = store.read_columns(["grade_reason"])
    assert "can't be taken as a patch" in row["grade_reason"]


async def test_the_graders_log_is_longer_than_an_observation(host: SandboxHost, tmp_path: Path) -> None:
    source = next(line[6:] for line in TASK.patch.splitlines() if line.startswith("+++ b/"))
    loud = [command(f"echo 'print(\"loud\" * 10000, flush=True); 1 / 0' >> {source}")]
    _, store, *_ = await play(host, tmp_path, loud, max_turns=1)
    (row,) = store.read_columns(["grade_log"])
    assert "cut" not in row["grade_log"] and len(row["grade_log"]) > 40_000


def graded_in_s(store: RunStore) -> float:
    (row,) = store.read_columns(["grade_s"])
    return float(row["grade_s"])
