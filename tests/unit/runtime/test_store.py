import json

import pyarrow.parquet as pq
import pytest

from thunder_rollout.agent.trajectory import EndReason, Trajectory, TurnRecord, WeightSegment
from thunder_rollout.errors import ConfigError
from thunder_rollout.runtime.store import FinishedSample, RunStore, SampleKey, choose_run


def turn(start: int = 0) -> TurnRecord:
    return TurnRecord(
        start=start,
        prompt_tokens=3,
        cached_tokens=1,
        output_tokens=2,
        finish_reason="stop",
        backend="engine0",
        weights=[WeightSegment(version="0", num_tokens=2), WeightSegment(version="1", num_tokens=1)],
        refill_tokens=5,
        queue_s=0.5,
        engine_s=0.25,
        prefill_s=0.125,
        decode_s=0.125,
        tool_s=0.0,
        command="submit",
    )


def sample(key: SampleKey, *, resolved: bool = True) -> FinishedSample:
    trajectory = Trajectory(prompt_ids=[1, 2, 3], end_reason=EndReason.SUBMITTED)
    trajectory.add_generated([4, 5], [-0.5, -0.25])
    trajectory.turns.append(turn())
    return FinishedSample(
        key=key,
        attempt=0,
        repo="toy/repo",
        kind="toy",
        trajectory=trajectory,
        reward=float(resolved),
        resolved=resolved,
        grade_reason="resolved",
        grade_log="1 passed",
        patch=b"\x00diff",
        model="m",
        temperature=1.0,
        sandbox_backend="local",
        sandbox_wait_s=0.0,
        grade_s=1.0,
        started_at=1.0,
        finished_at=2.0,
    )


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path / "run")
    store.open("a: 1\n")
    yield store
    store.close()


def test_a_written_sample_is_finished_and_reads_back(store):
    key = SampleKey("org/repo__1 x", 2)
    path = store.write(sample(key))
    assert store.finished() == {key}
    row = pq.read_table(path).to_pylist()[0]
    assert row["instance_id"] == "org/repo__1 x"
    assert (row["prompt_ids"], row["response_ids"]) == ([1, 2, 3], [4, 5])
    assert (row["loss_mask"], row["logprobs"]) == ([1, 1], [-0.5, -0.25])
    assert row["turns"][0]["queue_s"] == 0.5
    assert row["turns"][0]["exit_code"] is None
    assert row["patch"] == b"\x00diff"


def test_a_half_written_file_is_not_finished_and_is_swept(store, tmp_path):
    leftover = store.trajectories / ".x__0.parquet.99.tmp"
    leftover.write_bytes(b"half")
    assert store.finished() == set()
    store.close()
    again = RunStore(tmp_path / "run")
    again.open("a: 1\n")
    again.close()
    assert not leftover.exists()


def test_a_folder_in_use_is_refused(store):
    with pytest.raises(ConfigError, match="in use"):
        RunStore(store.folder).open("a: 1\n")


def test_a_folder_of_other_samples_is_refused_and_other_settings_are_not(tmp_path):
    def reopen(config_yaml: str) -> None:
        store = RunStore(tmp_path / "run")
        store.open(config_yaml)
        store.close()

    reopen("task: {seed: 0}\nrollout: {n: 4, concurrency: 8}\n")
    reopen("task: {seed: 0}\nrollout: {n: 4, concurrency: 2}\n")
    with pytest.raises(ConfigError, match=r"another task, rollout\.n"):
        reopen("task: {seed: 1}\nrollout: {n: 5, concurrency: 2}\n")


def test_two_folders_of_one_name_are_two_runs(tmp_path):
    assert RunStore(tmp_path / "a" / "run").run_id != RunStore(tmp_path / "b" / "run").run_id
    assert RunStore(tmp_path / "a" / "run").run_id.startswith("run-")


def test_failures_are_kept_line_by_line(store):
    store.write_failure(SampleKey("a", 0), "engine_died", "gone")
    store.write_failure(SampleKey("b", 1), "sandbox_failed", "gone")
    rows = [json.loads(line) for line in (store.folder / "failures.jsonl").read_text().splitlines()]
    assert [(row["instance_id"], row["kind"]) for row in rows] == [("a", "engine_died"), ("b", "sandbox_failed")]


def test_without_a_name_an_unfinished_run_of_the_same_configuration_goes_on(tmp_path):
    first = choose_run(tmp_path, None, "a: 1\n")
    first.close()
    second = choose_run(tmp_path, None, "a: 1\n")
    second.close()
    assert second.folder.resolve() == first.folder.resolve()


def test_without_a_name_a_stopped_run_goes_on_and_a_complete_one_does_not(tmp_path):
    first = choose_run(tmp_path, None, "a: 1\n")
    first.write_summary({"complete": False})
    first.close()
    second = choose_run(tmp_path, None, "a: 1\n")
    assert second.folder.resolve() == first.folder.resolve()
    second.write_summary({"complete": True})
    second.close()
    third = choose_run(tmp_path, None, "a: 1\n")
    third.close()
    assert third.folder.resolve() != first.folder.resolve()
    assert (tmp_path / "latest").resolve() == third.folder.resolve()


def test_without_a_name_another_configuration_is_a_new_run(tmp_path):
    first = choose_run(tmp_path, None, "a: 1\n")
    first.close()
    second = choose_run(tmp_path, None, "a: 2\n")
    second.close()
    assert second.folder != first.folder


def test_without_a_name_a_living_run_is_left_alone(tmp_path):
    first = choose_run(tmp_path, None, "a: 1\n")
    second = choose_run(tmp_path, None, "a: 1\n")
    assert second.folder != first.folder
    first.close()
    second.close()


def test_a_name_is_made_once_and_then_resumed(tmp_path):
    for _ in range(2):
        store = choose_run(tmp_path, "mine", "a: 1\n")
        assert store.folder == tmp_path / "mine"
        store.close()
    assert (tmp_path / "latest").resolve() == (tmp_path / "mine").resolve()
