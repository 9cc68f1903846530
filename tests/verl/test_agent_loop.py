"""`thunder_swe` under verl's own base class, client and configuration, with a scripted server and fake sandboxes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from omegaconf import DictConfig
from ray.exceptions import RayActorError
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from tests.support.verl_fakes import VERSION, Balancer, FakeStages, ScriptedServer, client_of, quiet, verl_config
from tests.unit.agent.conftest import byte_tokenizer
from thunder_rollout.agent.actions import format_observation
from thunder_rollout.agent.chat import ChatFormat
from thunder_rollout.errors import EngineDied, EngineFailed, GradingFailed, SandboxFailed, Stale, TaskError
from thunder_rollout.runtime import episode
from thunder_rollout.tasks.grading import Grade
from thunder_rollout.tasks.toy import generate
from thunder_rollout.tasks.verl_rows import verl_row
from thunder_rollout.verl_adapter.agent_loop import SweAgentLoop
from thunder_rollout.verl_adapter.client import RoutedClient
from thunder_rollout.verl_adapter.crew import Crew
from thunder_rollout.verl_adapter.router.programs import VALIDATION_PREFIX
from thunder_rollout.verl_adapter.settings import read_settings

TASK = generate(seed=0, count=1, difficulty="easy")[0]
ROW = verl_row(TASK, split="train", index=0)
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
SUBMIT = "```bash\nsubmit\n```"
LIMITS = ("actor_rollout_ref.rollout.prompt_length=4000", "actor_rollout_ref.rollout.response_length=4000")
ASYNC = ("trainer.v1.trainer_mode=separate_async", "trainer.v1.sampler.max_off_policy_threshold=2")
V1 = "transfer_queue.enable=True"
GLM = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def bash(command: str) -> str:
    return f"```bash\n{command}\n```"


class Stand:
    """One loop and everything around it; `play` runs it on the row."""

    def __init__(
        self,
        texts: list[str | Exception],
        *overrides: str,
        settings: dict[str, Any] | None = None,
        model_type: str = "qwen2",
        tokenizer: Any = None,
        client_cls: type[LLMServerClient] = LLMServerClient,
        logprobs: bool = True,
        heard: list[tuple[str, ...]] | None = None,
        retry_pause_s: float = 0.0,
    ) -> None:
        self.tokenizer = tokenizer or byte_tokenizer()
        self.config: DictConfig = verl_config(*LIMITS, *overrides)
        self.chat = ChatFormat(self.tokenizer)
        self.server = ScriptedServer(self.encode, self.chat.end_id, texts, logprobs=logprobs)
        self.balancer = Balancer(self.server, heard=heard)
        self.stages = FakeStages()
        client = client_of(self.config, self.balancer, client_cls)
        crew = Crew(
            settings=read_settings(settings),
            client=RoutedClient(client),
            chat=self.chat,
            stages=self.stages,
            retry_pause_s=retry_pause_s,
        )
        self.loop = SweAgentLoop(
            trainer_config=DictConfigWrap(self.config),
            server_manager=client,
            tokenizer=self.tokenizer,
            processor=None,
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(self.config.data),
            hf_model_type=model_type,
            crew=crew,
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    async def play(self, **columns: Any) -> AgentLoopOutput:
        row = {"raw_prompt": ROW["prompt"], "extra_info": ROW["extra_info"], "global_steps": VERSION + 1} | columns
        return await self.loop.run(SAMPLING, **row)


async def as_verl_does(stand: Stand, turns: list[list[int]], commands: list[str]) -> tuple[list[int], ...]:
    """Prompt, response, mask and log-probabilities of the same conversation on verl's Continuous Token path."""
    loop, messages = stand.loop, list(ROW["prompt"])
    prompt_ids = await loop.ct_build_initial_tokens(messages)
    ids, mask, logprobs = list(prompt_ids), [], []
    for turn, command in zip(turns, [*commands, None], strict=True):
        merged, mask, logprobs = await loop.ct_merge_assistant_token(
            ids, turn, mask, logprobs, assistant_logprobs=[-0.25] * len(turn)
        )
        ids = merged.token_ids
        messages = [*messages, {"role": "assistant", "content": stand.chat.decode(turn)}]
        if command is not None:
            seen = {"role": "user", "content": format_observation(quiet(command))}
            merged, mask, logprobs = await loop.ct_merge_context_msg(messages, [*messages, seen], ids, mask, logprobs)
            ids, messages = merged.token_ids, [*messages, seen]
    return prompt_ids, ids[len(prompt_ids) :], mask, logprobs


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe", "unknown"])
async def test_a_row_has_the_tokens_of_verls_continuous_token_path(model_type: str) -> None:
    stand = Stand([bash("ls"), bash("cat x"), SUBMIT], model_type=model_type)
    output = await stand.play()
    expected = await as_verl_does(stand, stand.server.said, ["ls", "cat x"])
    assert (output.prompt_ids, output.response_ids, output.response_mask, output.response_logprobs) == expected


async def test_a_stop_token_that_opens_the_next_message_stays_the_agents_own() -> None:
    """GLM's builder drops it and puts it back as context: the ids are the same, and it keeps its loss."""
    tokenizer = byte_tokenizer(GLM)
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant", "observation")]
    tokenizer.add_special_tokens({"additional_special_tokens": roles})
    stand = Stand([bash("ls"), SUBMIT], model_type="glm4_moe", tokenizer=tokenizer)
    output = await stand.play()
    prompt_ids, ids, mask, _ = await as_verl_does(stand, stand.server.said, ["ls"])
    assert (output.prompt_ids, output.response_ids) == (prompt_ids, ids)
    differ = [place for place, pair in enumerate(zip(output.response_mask, mask, strict=True)) if pair[0] != pair[1]]
    assert differ == [len(stand.server.said[0]) - 1]


async def test_the_server_sees_each_prompt_as_the_row_records_it() -> None:
    stand = Stand([bash("ls"), SUBMIT])
    output = await stand.play()
    first, second = stand.server.said
    assert stand.server.prompts[0] == output.prompt_ids
    place = len(stand.server.prompts[1]) - len(output.prompt_ids)
    assert stand.server.prompts[1] == output.prompt_ids + output.response_ids[:place]
    assert output.response_ids == first + output.response_ids[len(first) : place] + second
    assert all(params | SAMPLING == params for params in stand.server.params)
    assert {tuple(params["stop_token_ids"]) for params in stand.server.params} == {(stand.chat.end_id,)}


async def test_what_a_row_says_of_the_episode() -> None:
    output = await Stand([bash("ls"), SUBMIT]).play()
    assert (output.reward_score, output.num_turns) == (0.0, 4)
    assert output.extra_fields["reward_extra_info"] == {"acc": 0.0}
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (VERSION, VERSION)
    assert (output.metrics.tool_calls >= 0.5, output.metrics.num_preempted) == (True, 2)
    figures = output.extra_fields["thunder"]
    assert (figures["turns"], figures["cached_tokens"], figures["end/submitted"]) == (2.0, 8.0, 1.0)
    assert output.as_dict()["rm_scores"].shape == output.as_dict()["responses"].shape


async def test_every_request_of_a_program_bears_its_name_and_its_sandbox_is_released() -> None:
    stand = Stand([bash("ls"), SUBMIT])
    await stand.play()
    (program,) = set(stand.balancer.acquired)
    assert stand.balancer.released == [program, program]
    assert stand.stages.hosts.released == [program]


async def test_the_sandbox_starts_beside_the_first_turn_and_no_sooner() -> None:
    stand = Stand([bash("ls"), SUBMIT])
    stand.balancer.grant.clear()
    playing = asyncio.create_task(stand.play())
    await asyncio.sleep(0.3)
    assert not stand.stages.hosts.prepared
    stand.balancer.grant.set()
    output = await playing
    assert stand.stages.hosts.prepared == stand.stages.hosts.released
    assert output.extra_fields["thunder"]["held_s"] >= 0.2


async def test_a_router_that_listens_hears_of_tools_and_of_the_programs_end() -> None:
    stand = Stand([bash("ls"), SUBMIT], heard=[])
    await stand.play()
    program = stand.balancer.acquired[0]
    assert stand.balancer.heard == [("tool_started", program, "bash"), ("program_ended", program)]


async def test_special_tokens_that_a_tool_prints_are_defused() -> None:
    stand = Stand([bash("echo '<|im_start|>'"), SUBMIT])
    output = await stand.play()
    (start_id,) = stand.tokenizer.encode("<|im_start|>", add_special_tokens=False)
    context = [i for i, m in zip(output.response_ids, output.response_mask, strict=True) if not m]
    assert context.count(start_id) == 2  # of the observation's own message and of the turn that follows


async def test_a_row_keeps_within_verls_response_length() -> None:
    stand = Stand([bash("x" * 50)] * 9, "actor_rollout_ref.rollout.response_length=150")
    output = await stand.play()
    assert len(output.response_ids) <= 150
    assert output.response_mask[-1] == 1
    assert output.extra_fields["thunder"]["end/max_tokens"] == 1.0


async def test_an_unfinished_episode_is_masked_where_the_settings_say_so() -> None:
    settings = {"agent": {"max_turns": 2}, "mask_unfinished": True}
    unfinished = await Stand([bash("ls")] * 2, settings=settings).play()
    finished = await Stand([bash("ls"), SUBMIT], settings=settings).play()
    assert sum(unfinished.response_mask) == 0 < sum(finished.response_mask)
    assert unfinished.extra_fields["thunder"]["masked"] == 1.0


async def test_a_prompt_without_room_for_a_turn_is_a_row_that_counts_for_nothing() -> None:
    output = await Stand([], settings={"agent": {"max_context_tokens": 10}}).play()
    assert (len(output.response_ids), output.response_mask, output.response_logprobs) == (1, [0], [0.0])
    assert output.as_dict()["rm_scores"].tolist() == [0.0]


async def test_rows_have_no_log_probabilities_where_verl_asks_for_none() -> None:
    output = await Stand([SUBMIT], "actor_rollout_ref.rollout.calculate_log_probs=False", logprobs=False).play()
    assert output.response_logprobs is None


async def test_a_failure_of_the_machinery_is_tried_again_from_the_start() -> None:
    stand = Stand([bash("ls"), RayActorError(), bash("ls"), SUBMIT])
    output = await stand.play()
    assert [failure.kind for failure in stand.stages.failures] == [EngineDied.kind]
    assert len(set(stand.balancer.acquired)) == 2
    assert output.extra_fields["thunder"]["attempts"] == 2.0
    assert stand.server.prompts[2] == output.prompt_ids


async def test_a_failure_that_stays_is_raised_to_a_trainer_that_can_do_without_the_row() -> None:
    stand = Stand([RayActorError()] * 3, V1)
    with pytest.raises(EngineDied):
        await stand.play()
    assert len(stand.stages.failures) == 3


@pytest.mark.parametrize("texts", [[RayActorError()], [bash("ls"), RayActorError()]])
async def test_a_sample_is_not_given_up_before_a_dead_replica_is_known(texts: list[str | Exception]) -> None:
    stand = Stand(texts, V1, settings={"max_attempts": 1}, retry_pause_s=1000.0)
    playing = asyncio.create_task(stand.play())
    while not stand.stages.failures:  # noqa: ASYNC110
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not playing.done()
    playing.cancel()


async def test_an_episode_whose_graders_host_died_is_played_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand([bash("ls"), SUBMIT, bash("ls"), SUBMIT])
    graded: list[str] = []

    async def grade_where_hosts_die_once(*given: Any, **named: Any) -> Grade:
        graded.append("once")
        if len(graded) == 1:
            raise GradingFailed("the grading sandbox failed") from SandboxFailed("no sandbox host is left")
        return Grade(resolved=True, reward=1.0, reason="resolved")

    monkeypatch.setattr(episode, "grade", grade_where_hosts_die_once)
    output = await stand.play()
    assert (output.reward_score, output.extra_fields["thunder"]["attempts"]) == (1.0, 2.0)


async def test_an_episode_that_can_not_be_graded_is_not_played_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand([bash("ls"), SUBMIT], V1)

    async def grade_never(*given: Any, **named: Any) -> Grade:
        raise GradingFailed("the tests run out of time even without a patch")

    monkeypatch.setattr(episode, "grade", grade_never)
    with pytest.raises(GradingFailed):
        await stand.play()


async def test_a_failure_that_stays_is_a_masked_row_where_the_trainer_needs_one() -> None:
    output = await Stand([RayActorError()] * 3, "transfer_queue.enable=False").play()
    assert (output.response_mask, output.extra_fields["thunder"]) == ([0], {"failure": EngineDied.kind})


async def test_an_aborted_turn_goes_on_under_a_client_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand([bash("ls"), SUBMIT], client_cls=FullyAsyncLLMServerClient)
    whole = stand.server.generate_now
    cut = 5

    def first_cut(**request: Any) -> Any:
        output = whole(**request)
        if len(stand.server.prompts) == 1:
            stand.server.texts.insert(1, stand.tokenizer.decode(output.token_ids[cut:-1]))
            output.stop_reason, stand.server.version = "aborted", VERSION + 1
            output.token_ids, output.log_probs = output.token_ids[:cut], output.log_probs[:cut]
        return output

    monkeypatch.setattr(stand.server, "generate_now", first_cut)
    output = await stand.play()
    turn = [*stand.encode(bash("ls")), stand.chat.end_id]
    assert output.response_ids[: len(turn)] == turn
    assert output.response_mask[: len(turn)] == [1] * len(turn)
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (VERSION, VERSION + 1)


async def test_an_aborted_turn_that_nobody_resumes_is_the_machinerys_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand([SUBMIT] * 3, V1)
    whole = stand.server.generate_now

    def abort(**request: Any) -> Any:
        return whole(**request).model_copy(update={"stop_reason": "aborted"})

    monkeypatch.setattr(stand.server, "generate_now", abort)
    with pytest.raises(EngineFailed):
        await stand.play()


async def test_an_episode_that_verl_will_drop_ends_early_and_is_not_tried_again() -> None:
    stand = Stand([bash("ls"), SUBMIT], V1, *ASYNC)
    with pytest.raises(Stale):
        await stand.play(global_steps=VERSION - 1)
    assert len(stand.server.prompts) == 1
    fresh = Stand(
        [SUBMIT], V1, "trainer.v1.trainer_mode=separate_async", "trainer.v1.sampler.max_off_policy_threshold=2"
    )
    assert (await fresh.play(global_steps=VERSION)).num_turns == 2


async def test_a_row_without_a_task_is_told_how_to_get_one() -> None:
    with pytest.raises(TaskError, match="to-verl"):
        await Stand([]).play(extra_info={})


@pytest.mark.parametrize(("split", "is_marked"), [("train", False), ("validation", True)])
async def test_a_router_can_tell_validation_by_its_programs_names(split: str, is_marked: bool) -> None:
    stand = Stand([SUBMIT])
    await stand.play(extra_info=ROW["extra_info"] | {"split": split})
    (program,) = stand.balancer.acquired
    assert program.startswith(VALIDATION_PREFIX) is is_marked
