"""Bad input at the command line: the field and the remedy, exit code 2, no traceback, nothing started."""

import json
import logging
import sys

import pytest

from thunder_rollout.cli import main
from thunder_rollout.engine.random_model import write_preset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_preset("qwen2_test", tmp_path_factory.mktemp("model")).path


@pytest.fixture
def refused(capfd, monkeypatch, tmp_path):
    """Run a command that must be refused; returns what it said. Hydra gives the root logger the captured stderr."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["thunder-rollout", *args])
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        said = capfd.readouterr()
        assert ended.value.code == 2
        assert "Traceback" not in said.err + said.out
        return said.err + said.out

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def write_tasks(path, **changes) -> str:
    row = {
        "instance_id": "org__repo-1",
        "repo": "org/repo",
        "base_commit": "abc",
        "problem_statement": "fix",
        "image_name": "some/image",
        "FAIL_TO_PASS": ["t.py::test"],
        "PASS_TO_PASS": "[]",
        "patch": "",
        "test_patch": "",
    } | changes
    path.write_text(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
    return f"task.path={path}"


def test_a_misspelt_override_is_named(refused):
    assert "rollout.num_engine: no such field; did you mean rollout.num_engines?" in refused(
        "rollout", "rollout.num_engine=1"
    )


def test_a_command_of_a_group_names_its_field(refused):
    assert "validation_share=2.0: must be from 0 to 1" in refused("tasks", "to-verl", "validation_share=2")


def test_a_misspelt_group_option_is_named_with_the_choices(refused):
    said = refused("rollout", "scheduler=thunderr")
    assert "thunderr" in said
    assert "sticky" in said


def test_a_wrong_type_is_named(refused):
    assert "rollout.n" in refused("rollout", "rollout.n=four")


def test_zero_engines_are_refused(refused):
    said = refused("rollout", "rollout.num_engines=0")
    assert "rollout.num_engines" in said
    assert "at least 1" in said


def test_a_model_folder_that_is_not_there_is_refused(refused):
    assert "engine.model" in refused("rollout", "engine.model=/no/such/model")


def test_a_model_folder_without_a_tokenizer_is_refused(refused, model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    said = refused("rollout", f"engine.model={bare}")
    assert "engine.model" in said
    assert "tokenizer" in said


def test_a_task_file_that_is_not_there_is_refused(refused, model):
    said = refused("rollout", f"engine.model={model}", "task=file", "task.path=/no/such.jsonl")
    assert "/no/such.jsonl" in said


def test_a_task_row_without_an_image_is_refused(refused, model, tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl", image_name=None)
    said = refused("rollout", f"engine.model={model}", "task=file", "task.source=plain", path)
    assert "org__repo-1" in said
    assert "image" in said


def test_a_kv_pool_too_small_for_the_longest_turn_is_refused(refused, model):
    said = refused("rollout", f"engine.model={model}", "engine.kv_cache_tokens=1024", "engine.max_model_len=8192")
    assert "engine.kv_cache_tokens" in said


def test_an_unknown_policy_is_refused_with_the_choices(refused, model):
    said = refused("rollout", f"engine.model={model}", "scheduler.policy=fifo")
    assert "scheduler.policy" in said
    assert "sticky" in said


def test_a_field_that_no_yaml_names_can_be_set_all_the_same(refused, model):
    assert "sandbox.limits.ttl_s" in refused("rollout", f"engine.model={model}", "sandbox.limits.ttl_s=10")
    assert "scheduler.capped.max_programs=0" in refused("rollout", "scheduler.capped.max_programs=0")


@pytest.mark.parametrize("name", ["latest", "a/b", ".x", "a:b"])
def test_a_run_name_that_cannot_be_a_folder_is_refused(refused, name):
    assert "name=" in refused("rollout", f"name='{name}'")


def test_a_benchmark_of_no_policy_is_refused(refused):
    assert "policies" in refused("bench", "policies=[fastest]")


def test_refusals_leave_no_run_folder(refused, model, tmp_path):
    refused("rollout", f"engine.model={model}", "task=file", "task.path=/no/such.jsonl")
    assert not (tmp_path / "runs").exists()


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "rollout" in capsys.readouterr().out
