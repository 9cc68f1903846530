"""The tiny policy's recipe as a user runs it, with a model made tinier still."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[3] / "recipes" / "tiny_policy"


def run_recipe(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = RECIPE.parents[1]
    environment = os.environ | {"THUNDER_HOME": str(home), "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(RECIPE / "train.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def write_config(path: Path, **train: object) -> Path:
    config = yaml.safe_load((RECIPE / "config.yaml").read_text())
    config["tokenizer"] |= {"num_transcripts": 20}
    config["model"] |= {"hidden_size": 32, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 32}
    config["train"] |= {"num_steps": 2, "batch_transcripts": 2} | train
    path.write_text(yaml.safe_dump(config))
    return path


def last_line(ran: subprocess.CompletedProcess[str]) -> str:
    return ran.stdout.splitlines()[-1]


def test_the_policy_is_built_once_as_a_hugging_face_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = write_config(tmp_path / "config.yaml")
    interrupted = tmp_path / "tiny_policy" / ".building"
    interrupted.mkdir(parents=True)
    (interrupted / "left-over").touch()
    first = run_recipe(tmp_path, "--config", str(config))
    assert first.returncode == 0, first.stderr
    folder = Path(last_line(first))
    assert (tmp_path / "tiny_policy" / "current").resolve() == folder.resolve()
    assert not interrupted.exists() and not (folder / "left-over").exists()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen2" and model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == (
        "<|im_start|>user\na<|im_end|>\n"
    )

    (tmp_path / "tiny_policy" / "current").unlink()
    second = run_recipe(tmp_path, "--config", str(config), "--keep-current")
    assert second.stdout == f"{folder}\n"
    assert not (tmp_path / "tiny_policy" / "current").exists()


def test_the_path_is_told_without_building(tmp_path: Path) -> None:
    ran = run_recipe(tmp_path, "--print-path")
    assert Path(last_line(ran)).parent == tmp_path / "tiny_policy"
    assert not (tmp_path / "tiny_policy").exists()


def test_another_config_is_another_policy(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml")
    assert last_line(run_recipe(tmp_path, "--print-path")) != last_line(
        run_recipe(tmp_path, "--print-path", "--config", str(config))
    )


@pytest.mark.parametrize(("train", "named"), [({"steps": 3}, "train.steps"), ({"num_steps": "many"}, "num_steps")])
def test_a_wrong_setting_is_named(tmp_path: Path, train: dict[str, object], named: str) -> None:
    config = write_config(tmp_path / "config.yaml", **train)
    ran = run_recipe(tmp_path, "--config", str(config))
    assert ran.returncode == 2 and named in ran.stderr and "Traceback" not in ran.stderr


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    ran = run_recipe(tmp_path, "--config", str(tmp_path / "gone.yaml"))
    assert ran.returncode == 2 and "gone.yaml" in ran.stderr and "Traceback" not in ran.stderr
