"""Rows of `thunder_swe` in the hands of verl's own workers, whichever trainer they are of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker
from verl.trainer.ppo.v1 import agent_loop_tq

from tests.unit.agent.conftest import byte_tokenizer
from thunder_rollout.agent.trajectory import EndReason, Trajectory
from thunder_rollout.runtime.episode import Played
from thunder_rollout.tasks.grading import Grade
from thunder_rollout.verl_adapter.client import RoutedClient, VerlModel, VersionSpan
from thunder_rollout.verl_adapter.output import failed_row, played_row

PROMPT, RESPONSE, MASK, LOGPROBS = [5, 6], [7, 8, 9, 10], [1, 1, 0, 1], [-0.1, -0.2, 0.0, -0.4]
END = 3
COLUMNS = {"raw_prompt": [], "uid": "u", "session_id": 0, "global_steps": 4}
LIMITS = SimpleNamespace(prompt_length=4, response_length=6)


def played(resolved: bool = True) -> AgentLoopOutput:
    client: Any = object.__new__(RoutedClient)
    model = VerlModel(client=client, program="p", sampling_params={}, versions=VersionSpan(first=3, last=4))
    episode = Played(
        trajectory=Trajectory(
            prompt_ids=list(PROMPT),
            response_ids=list(RESPONSE),
            loss_mask=list(MASK),
            logprobs=list(LOGPROBS),
            end_reason=EndReason.SUBMITTED,
        ),
        patch=b"",
        verdict=Grade(resolved=resolved, reward=float(resolved)),
        sandbox_wait_s=0.0,
        grade_s=1.5,
    )
    return played_row(episode, model, mask_unfinished=False, attempts=1, end_id=END)


def worker(cls: type) -> Any:
    made: Any = object.__new__(cls)
    made.tokenizer, made.processor = byte_tokenizer(), None
    made.tokenizer.pad_token_id = 0
    made.rollout_config, made.mm_processor_kwargs = LIMITS, {}
    made.reward_loop_worker_handles, made.distillation_enabled = [], False
    return made


async def test_a_v0_batch_holds_played_and_failed_rows_side_by_side() -> None:
    v0 = worker(AgentLoopWorker)
    outputs = [played(), failed_row(list(PROMPT), END, "engine_died", has_logprobs=True)]
    padded = [await v0._agent_loop_postprocess(output, False, **COLUMNS) for output in outputs]
    batch = v0._postprocess(padded, input_non_tensor_batch={"uid": np.array(["u", "u"], dtype=object)})
    assert batch.batch["responses"][0].tolist() == [*RESPONSE, 0, 0]
    assert batch.batch["response_mask"].tolist() == [[*MASK, 0, 0], [0] * 6]
    assert batch.batch["rollout_log_probs"][0].tolist() == pytest.approx([*LOGPROBS, 0.0, 0.0])
    assert batch.batch["rm_scores"].sum(dim=1).tolist() == [1.0, 0.0]
    assert batch.non_tensor_batch["acc"].tolist() == [1.0, 0.0]
    assert batch.non_tensor_batch["thunder"][1] == {"failure": "engine_died"}
    assert batch.meta_info["metrics"][0]["compute_score"] == 1.5


async def test_a_v1_row_reaches_the_queue_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    put: dict[str, Any] = {}

    async def keep(**given: Any) -> None:
        put.update(given)

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", keep)
    v1 = worker(agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class)
    await v1._agent_loop_postprocess(played(), False, **COLUMNS)
    assert (put["keys"], put["partition_id"]) == (["u_0_0"], "train")
    (tag,) = put["tags"]
    assert (tag["min_global_steps"], tag["max_global_steps"], tag["response_len"]) == (3, 4, len(RESPONSE))
    fields = put["fields"]
    assert fields["input_ids"][0].tolist() == PROMPT + RESPONSE
    assert fields["response_mask"][0].tolist() == fields["loss_mask"][0].tolist() == MASK
    assert torch.allclose(fields["rollout_log_probs"][0], torch.tensor(LOGPROBS))
    assert fields["rm_scores"][0].tolist() == [0.0, 0.0, 0.0, 1.0]
