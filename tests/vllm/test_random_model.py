from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from thunder_rollout.engine.config import check_model_folder
from thunder_rollout.engine.random_model import write_preset
from thunder_rollout.errors import ConfigError


def test_the_presets_have_the_sizes_they_are_named_for(tmp_path: Path) -> None:
    assert round(write_preset("qwen2_3m", tmp_path / "a").num_parameters / 1e6, 1) == 3.4
    assert round(write_preset("qwen2_26m", tmp_path / "b").num_parameters / 1e6) == 26
    with pytest.raises(ConfigError, match="qwen2_3m"):
        write_preset("qwen2_7b", tmp_path)


def test_a_seed_gives_one_model(tmp_path: Path) -> None:
    weights = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_preset("qwen2_test", tmp_path / folder, seed=seed)
        weights.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    check_model_folder(str(tmp_path / "a"))


def test_its_tokenizer_knows_every_byte_and_chat(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_preset("qwen2_test", tmp_path).path)
    text = "def f():\n\treturn 'ü€😀' # \\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
