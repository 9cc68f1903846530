"""Loaded by verl's processes (`VERL_USE_EXTERNAL_MODULES`): what its engines answered and what its trainer got.

Both go as lines of JSON into the folder of the environment's VERL_RECORDS; `read` gives them back.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from thunder_rollout.verl_adapter import cpu  # noqa: F401  before anything asks verl for its platform

if os.environ.get("VERL_RECORDS"):
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register("vllm", lambda: _recording_replica())


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def write(name: str, record: dict[str, Any]) -> None:
    with (Path(os.environ["VERL_RECORDS"]) / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def _recording_replica() -> type:
    import ray
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

    class Server(vLLMHttpServer):
        async def generate(self, prompt_ids: list[int], *args: Any, **kwargs: Any) -> Any:
            output = await super().generate(prompt_ids, *args, **kwargs)
            write(
                "engine",
                {
                    "version": output.extra_fields["global_steps"],
                    "prompt_ids": list(prompt_ids),
                    "token_ids": list(output.token_ids),
                    "logprobs": list(output.log_probs),
                },
            )
            return output

    class Replica(vLLMReplica):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.server_class = ray.remote(Server)

    return Replica


def make_recording_sampler(**given: Any) -> Any:
    """Our sampler, which also writes down the rows that it hands to the trainer."""
    import transfer_queue

    from thunder_rollout.verl_adapter.sampler import make_sampler

    sampler = make_sampler(**given)
    sample = sampler.sample

    def sample_and_record(global_steps: int, partition_id: str, batch_size: int) -> Any:
        batch, metrics = sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
        fields = ["prompts", "responses", "response_mask", "rollout_log_probs", "rm_scores"]
        rows = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=partition_id, select_fields=fields)
        for index, key in enumerate(batch.keys):
            write("rows", {"step": global_steps, "key": key} | {name: rows[name][index].tolist() for name in fields})
        return batch, metrics

    sampler.sample = sample_and_record
    return sampler
