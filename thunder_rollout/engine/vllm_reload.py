"""Reloading weights on the CPU: vLLM's worker with one gap closed.

On the CPU vLLM packs every weight matrix into a kernel of its own, the output head's too. Its reload
packs anew what the checkpoint names; a head that is tied to the embedding has no name of its own there
and would go on with the old weights, silently. `tests/vllm/test_vllm_weights.py` tells when a version
of vLLM needs this no more.

vLLM mixes the class into its workers (`worker_extension_cls`), in whatever process they are.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class CpuReload:
    reload_weights: Any  # the worker's own
    model_runner: Any

    def reload_weights_on_cpu(self, weights_path: str) -> None:
        self.reload_weights(weights_path=weights_path)
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
