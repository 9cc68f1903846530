"""vLLM's native KV offload: what `engine.kv_offload_gib` becomes.

Everything computed is copied to host memory as well, least recently used first out, and a prompt that
has left the GPU is loaded from there instead of being prefilled. vLLM 0.28 copies between the host and
CUDA-like or XPU devices alone. Composed and checked up to the engine's configuration; it was not run,
for want of a GPU.
"""

from __future__ import annotations

from typing import Any

_GIB = 1 << 30
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def offload_arguments(offload_gib: float) -> dict[str, Any]:
    """Engine arguments. A turn's output is kept too (vLLM's default is the prompt alone): it is the
    history of the next turn."""
    if not offload_gib:
        return {"kv_offloading_size": None, "kv_transfer_config": None}
    from vllm.config import KVTransferConfig

    extra = {"offload_prompt_only": False}
    return {
        "kv_offloading_size": offload_gib,
        "kv_transfer_config": KVTransferConfig(kv_connector_extra_config=extra),
    }


def offload_tokens(vllm_config: Any, offload_gib: float) -> int:
    """Tokens of KV that the tier holds, over all ranks together as vLLM counts its size. Every rank keeps its
    own copy of what ranks share."""
    if not offload_gib:
        return 0
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = str(vllm_config.cache_config.cache_dtype)
    if dtype == "auto":
        dtype = str(model.dtype).removeprefix("torch.")
    vectors = 1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)
    values = vectors * model.get_head_size() * model.get_total_num_hidden_layers()
    token_bytes = values * parallel.tensor_parallel_size * _DTYPE_BYTES.get(dtype, 1)
    return int(offload_gib * _GIB) // token_bytes
