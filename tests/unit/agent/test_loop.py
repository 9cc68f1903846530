"""The turn loop over a scripted model and a fake sandbox: exact ids, masks and reasons to end."""

from dataclasses import dataclass, field

import pytest

from thunder_rollout.agent.config import AgentConfig
from thunder_rollout.agent.loop import AgentLoop, TurnResult, in_one_piece
from thunder_rollout.agent.trajectory import EndReason, Trajectory
from thunder_rollout.engine.protocol import Generation, Sampling
from thunder_rollout.sandbox.fake import FakeSandbox
from thunder_rollout.sandbox.protocol import ExecResult, SandboxSpec

SUBMIT = "```bash\nsubmit\n```"


def bash(command: str) -> str:
    return f"```bash\n{command}\n```"


@dataclass
class ScriptedModel:
    """Says one text after another, closing each turn, and keeps every prompt it saw."""

    chat: object
    tokenizer: object
    texts: list[str]
    closed: bool = True
    prompts: list[list[int]] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)

    async def turn(self, prompt_ids: list[int], sampling: Sampling) -> TurnResult:
        self.prompts.append(list(prompt_ids))
        self.budgets.append(sampling.max_tokens)
        ids = self.tokenizer.encode(self.texts[len(self.prompts) - 1], add_special_tokens=False)
        ids = ([*ids, self.chat.end_id] if self.closed else ids)[: sampling.max_tokens]
        generation = Generation(
            token_ids=ids,
            logprobs=[-0.5] * len(ids),
            finish_reason="stop",
            prompt_tokens=len(prompt_ids),
            cached_tokens=0,
            queue_s=0.0,
            prefill_s=0.25,
            decode_s=0.75,
        )
        return in_one_piece(generation, backend="e0", queue_s=1000.0, engine_s=2000.0)

    async def tool_started(self, tool: str) -> None:
        self.tools.append("started")

    async def tool_ended(self) -> None:
        self.tools.append("ended")


def echo(command: str) -> ExecResult:
    return ExecResult(exit_code=0, output=command, timed_out=False, took_s=0.0)


@pytest.fixture
def play(chat, tokenizer):
    async def run(texts: list[str], *, model_len: int = 10_000, answer=echo, **kwargs):
        model = ScriptedModel(chat, tokenizer, texts, kwargs.pop("closed", True))
        sandbox = FakeSandbox(SandboxSpec(image="any"), answer)
        await sandbox.start()
        loop = AgentLoop(
            chat=chat,
            config=AgentConfig(**{"max_turns": 5, "system_prompt": "act", **kwargs}),
            sampling=Sampling(max_tokens=1),
            max_model_len=model_len,
        )
        return await loop.run("fix it", model, sandbox), model, sandbox

    return run


def check_invariants(trajectory: Trajectory, model: ScriptedModel) -> None:
    assert len(trajectory.response_ids) == len(trajectory.loss_mask) == len(trajectory.logprobs)
    assert all(p == 0.0 for p, m in zip(trajectory.logprobs, trajectory.loss_mask, strict=True) if not m)
    assert all(p == -0.5 for p, m in zip(trajectory.logprobs, trajectory.loss_mask, strict=True) if m)
    for record, prompt in zip(trajectory.turns, model.prompts, strict=True):
        assert prompt == trajectory.prompt_ids + trajectory.response_ids[: record.start]
        assert sum(trajectory.loss_mask[record.start : record.start + record.output_tokens]) == record.output_tokens


async def test_a_submitted_episode_holds_the_exact_tokens(play, chat, tokenizer):
    trajectory, model, sandbox = await play([bash("ls"), SUBMIT])
    check_invariants(trajectory, model)
    assert trajectory.end_reason is EndReason.SUBMITTED
    assert sandbox.commands == ["ls"]
    assert model.tools == ["started", "ended"]
    said = [*tokenizer.encode(bash("ls")), chat.end_id]
    seen = chat.observation_ids("[exit 0]\nls", ended=True)
    assert trajectory.response_ids == said + seen + [*tokenizer.encode(SUBMIT), chat.end_id]
    assert [turn.command for turn in trajectory.turns] == ["ls", "submit"]


async def test_a_malformed_action_is_told_how_to_act_and_runs_nothing(play):
    trajectory, model, sandbox = await play(["I think.", SUBMIT])
    check_invariants(trajectory, model)
    assert sandbox.commands == []
    assert trajectory.end_reason is EndReason.SUBMITTED


async def test_the_last_turn_allowed_ends_the_episode_without_a_trailing_observation(play):
    trajectory, model, _ = await play([bash("ls")] * 3, max_turns=3)
    check_invariants(trajectory, model)
    assert trajectory.end_reason is EndReason.MAX_TURNS
    assert len(trajectory.turns) == 3
    assert trajectory.loss_mask[-1] == 1


async def test_the_context_limit_ends_the_episode_and_is_never_passed(play):
    trajectory, model, _ = await play([bash("x" * 40)] * 5, max_context_tokens=400)
    check_invariants(trajectory, model)
    assert trajectory.end_reason is EndReason.MAX_TOKENS
    assert trajectory.num_tokens <= 400
    assert all(len(p) + b <= 400 for p, b in zip(model.prompts, model.budgets, strict=True))


async def test_a_prompt_beyond_the_engine_never_reaches_it(play):
    trajectory, model, _ = await play([SUBMIT], model_len=5)
    assert (trajectory.end_reason, model.prompts, trajectory.response_ids) == (EndReason.MAX_TOKENS, [], [])


async def test_a_turn_cut_short_is_closed_as_context(play, chat):
    trajectory, model, _ = await play([bash("ls"), SUBMIT], closed=False)
    check_invariants(trajectory, model)
    first = trajectory.turns[0]
    after = first.start + first.output_tokens
    assert trajectory.response_ids[after] == chat.end_id
    assert trajectory.loss_mask[after] == 0


async def test_time_at_work_and_in_commands_ends_the_episode_and_waiting_for_machinery_does_not(play):
    def slow(command: str) -> ExecResult:
        return ExecResult(exit_code=0, output="", timed_out=False, took_s=4.0)

    trajectory, _, _ = await play([bash("ls")] * 5, answer=slow, max_episode_s=9.0)
    assert trajectory.end_reason is EndReason.MAX_TIME
    assert [turn.tool_s for turn in trajectory.turns] == [4.0, 4.0]
