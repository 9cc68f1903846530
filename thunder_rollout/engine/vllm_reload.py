"""Reloading weights file by file, as one update: vLLM's own `reload_weights` in three parts.

`begin_reload` and `end_reload` go around any number of `reload_file`; a layer is loaded when the last of its
tensors has come. No turn may run in between.

On the CPU one gap is closed: vLLM packs every weight matrix into a kernel of its own, the output head's too.
Its reload packs anew what the checkpoint names; a head that is tied to the embedding has no name of its own
there and would go on with the old weights, silently. `tests/vllm/test_vllm_weights.py` tells when a version
of vLLM needs this no more.

vLLM mixes the class into its workers (`worker_extension_cls`), in whatever process they are.
"""

from __future__ import annotations

from typing import Any

from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
from vllm.platforms import current_platform


class FileReload:
    model_runner: Any
    vllm_config: Any

    def begin_reload(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def reload_file(self, path: str) -> None:
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(safetensors_weights_iterator([path], use_tqdm_on_load=False))

    def end_reload(self) -> None:
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_runner.model_config)
            self.model_runner.reset_lora_state()
            self.model_runner.reset_encoder_cache()
            self.model_runner.reset_mm_cache()
            if current_platform.is_cpu():
                for layer in model.modules():
                    if isinstance(layer, ParallelLMHead):
                        layer.quant_method.process_weights_after_loading(layer)
