"""vLLM's CPU worker under verl: weights that can be loaded again.

On the CPU vLLM packs every linear layer's weight into a kernel of its own and then deletes `layer.weight`, so
that the next load has nothing to write to. Here it stays, and verl's own call of vLLM's post-processing after each
update packs it anew. Twice the memory of the linear layers is the price.

vLLM mixes the class into its workers: `+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=
thunder_rollout.verl_adapter.cpu_worker.CpuWorkerExtension`.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm


class CpuWorkerExtension(vLLMColocateWorkerExtension):
    def __new__(cls, **kwargs: Any) -> CpuWorkerExtension:
        UnquantizedLinearMethod.process_weights_after_loading = _pack_and_keep
        return super().__new__(cls, **kwargs)


def _pack_and_keep(self: Any, layer: Any) -> None:
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
