"""The recipe that sets two balancers against each other: its configuration, and the agent loop that plays in verl."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from tests.support.recipes import load_recipe
from tests.support.verl_fakes import Balancer, Method, client_of, verl_config
from tests.unit.agent.conftest import byte_tokenizer
from thunder_rollout.bench.workload import Script, ScriptedTurn
from thunder_rollout.errors import EngineFailed

SCRIPT = Script(
    index=0,
    num_turns_over=0,
    turns=[ScriptedTurn([1, 2, 3], 2, 0.0, "shell"), ScriptedTurn([4, 5], 1, 0.0, "shell")],
    context_ids=[],
    group=None,
)


@pytest.fixture(scope="module")
def stack() -> ModuleType:
    return load_recipe("verl_pressure", "verl_stack.py")


class Server:
    """Says as many tokens as it is asked for, or one at most."""

    def __init__(self, *, most: int = 100) -> None:
        self.most = most
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    def generate_now(self, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        self.asked.append((prompt_ids, sampling_params))
        num_tokens = min(self.most, sampling_params["max_tokens"])
        return TokenOutput(token_ids=[9] * num_tokens, extra_fields={"num_cached_tokens": len(self.asked) - 1})

    @property
    def generate(self) -> Method:
        return Method(self.generate_now)


async def play(stack: ModuleType, server: Server) -> AgentLoopOutput:
    config = verl_config()
    loop = stack.ScriptedLoop(
        trainer_config=DictConfigWrap(config),
        server_manager=client_of(config, Balancer(server)),
        tokenizer=byte_tokenizer(),
        processor=None,
        dataset_cls=RLHFDataset,
        data_config=DictConfigWrap(config.data),
        hf_model_type="qwen2",
    )
    return await loop.run({"temperature": 1.0}, script=SCRIPT, raw_prompt=[])


async def test_each_turn_sends_the_whole_context_and_asks_for_the_scripts_number_of_tokens(stack: ModuleType) -> None:
    server = Server()
    await play(stack, server)
    limits = {"temperature": 1.0, "ignore_eos": True}
    assert server.asked == [
        ([1, 2, 3], limits | {"max_tokens": 2}),
        ([1, 2, 3, 9, 9, 4, 5], limits | {"max_tokens": 1}),
    ]


async def test_the_row_is_what_verl_expects_and_says_what_each_turn_found_in_the_cache(stack: ModuleType) -> None:
    output = await play(stack, Server())
    assert output.prompt_ids == [1, 2, 3]
    assert output.response_ids == [9, 9, 4, 5, 9]
    assert output.response_mask == [1, 1, 0, 0, 1]
    first, second = output.extra_fields["scripted"]
    assert (first["prompt_tokens"], first["known_tokens"], first["cached_tokens"]) == (3, 0, 0)
    assert (second["prompt_tokens"], second["known_tokens"], second["cached_tokens"]) == (7, 5, 1)


async def test_a_turn_of_another_length_is_no_measurement(stack: ModuleType) -> None:
    with pytest.raises(EngineFailed, match="1 tokens, not 2"):
        await play(stack, Server(most=1))


def test_verl_takes_the_configuration_and_a_batch(stack: ModuleType) -> None:
    measure = load_recipe("verl_pressure", "measure.py")
    for more in ([], measure.QUICK):
        own, config = measure.read_config([*more, "actor_rollout_ref.model.path=x"])
        rollout = config.actor_rollout_ref.rollout
        block_tokens = rollout.engine_kwargs.vllm.block_size
        capacity = (rollout.engine_kwargs.vllm.num_gpu_blocks_override - 1) * block_tokens
        measure.check_room(measure.workload_of(own), rollout, [capacity])
        (loop,) = OmegaConf.load(rollout.agent.agent_loop_config_path)
        assert loop.name == rollout.agent.default_agent_loop
        assert loop._target_ == f"verl_stack.{stack.ScriptedLoop.__name__}"
    batch = stack.batch_of([SCRIPT, SCRIPT], 3)
    assert len(batch) == 2
    assert batch.chunk(1)[0].non_tensor_batch["script"][0] is SCRIPT
