"""What the tiny policy learns from are, id for id, episodes of the real agent loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.recipes import load_recipe
from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.agent.config import SYSTEM_PROMPT, AgentConfig
from thunder_rollout.agent.loop import AgentLoop, TurnResult, in_one_piece
from thunder_rollout.agent.trajectory import EndReason
from thunder_rollout.engine.protocol import Generation, Sampling
from thunder_rollout.sandbox.fake import FakeSandbox
from thunder_rollout.sandbox.protocol import ExecResult
from thunder_rollout.tasks.environment import sandbox_spec, started
from thunder_rollout.tasks.toy.generator import to_task


@dataclass
class Scripted:
    """Generates the given turns, one after the other."""

    turns: list[list[int]]

    async def turn(self, prompt_ids: list[int], sampling: Sampling) -> TurnResult:
        token_ids = self.turns.pop(0)
        generation = Generation(
            token_ids=token_ids,
            logprobs=[0.0] * len(token_ids),
            finish_reason="stop",
            prompt_tokens=len(prompt_ids),
            cached_tokens=0,
            queue_s=0.0,
            prefill_s=0.0,
            decode_s=0.0,
        )
        return in_one_piece(generation, backend="scripted", queue_s=0.0, engine_s=0.0)

    async def tool_started(self, tool: str) -> None: ...

    async def tool_ended(self) -> None: ...


def playback(outputs: Iterable[str]) -> Callable[[str], ExecResult]:
    """A sandbox's script that gives the outputs in order, whatever the command."""
    left = iter(outputs)
    return lambda command: ExecResult(exit_code=0, output=next(left), timed_out=False, took_s=0.1)


async def test_a_transcript_is_the_episode_the_loop_would_record(tmp_path: Path) -> None:
    transcripts, tokenizers = load_recipe("tiny_policy", "transcripts.py"), load_recipe("tiny_policy", "tokenizer.py")
    made = list(transcripts.transcripts("test", "easy", 12, mistake_share=0.5, hasty_share=0.25))
    texts = [text for transcript in made for text in transcripts.transcript_texts(transcript)]
    tokenizer = tokenizers.learn_tokenizer(texts, 600, [SYSTEM_PROMPT], tmp_path)
    chat = ChatFormat(tokenizer)
    for transcript in made:
        tokenised = transcripts.tokenise(transcript, chat, tokenizer)
        written = [[*tokenizer.encode(turn.text), chat.end_id] for turn in transcript.turns]
        loop = AgentLoop(chat=chat, config=AgentConfig(), sampling=Sampling(max_tokens=1), max_model_len=100_000)
        spec = sandbox_spec(to_task(transcript.problem, "toy", "easy"))
        async with started(FakeSandbox(spec, playback(turn.output for turn in transcript.turns))) as sandbox:
            episode = await loop.run(transcript.problem.statement, Scripted(written), sandbox)
        assert episode.end_reason == EndReason.SUBMITTED
        assert episode.context_ids == tokenised.ids.tolist()
        mask = [0] * len(episode.prompt_ids) + episode.loss_mask
        mistaken = any(not turn.imitate for turn in transcript.turns)
        assert (mask == tokenised.learn.tolist()) != mistaken
