"""Qwen2 models with random weights and a byte-level tokenizer, for tests and benchmarks.

What such a model says means nothing, but it costs what a real one of its size costs, and it loads
wherever a Hugging Face folder does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thunder_rollout.errors import ConfigError

MAX_POSITION = 16_384
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Shape:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    path: Path
    vocab_size: int
    num_parameters: int


PRESETS = {
    "qwen2_test": Qwen2Shape(
        hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=128, vocab_size=512
    ),
    "qwen2_3m": Qwen2Shape(hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=512),
    "qwen2_26m": Qwen2Shape(hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=2, intermediate_size=1536),
}


def write_preset(name: str, folder: Path, *, seed: int = 0) -> RandomModel:
    """Write the preset `name` (a key of `PRESETS`) to `folder`; the same seed gives the same model."""
    if name not in PRESETS:
        raise ConfigError(f"model={name!r}: no such random model; it is one of {', '.join(PRESETS)}")
    return write_random_qwen2(folder, PRESETS[name], seed=seed)


def write_random_qwen2(folder: Path, shape: Qwen2Shape, *, seed: int = 0) -> RandomModel:
    """Write config, weights (bfloat16) and tokenizer to `folder`.

    The tokenizer knows the 256 bytes and `SPECIAL_TOKENS`; ids above them are valid to the model
    and have no text.
    """
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = _byte_tokenizer()
    assert shape.vocab_size >= len(tokenizer)
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return RandomModel(path=folder, vocab_size=shape.vocab_size, num_parameters=model.num_parameters())


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
