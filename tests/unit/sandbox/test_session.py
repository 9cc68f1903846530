from __future__ import annotations

import subprocess

import pytest

from thunder_rollout.sandbox.session import Life, life_of, new_session


def test_a_session_lives_as_long_as_its_process() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    session = new_session(process.pid)
    try:
        assert life_of(session) is Life.GOING_ON
        process.kill()
        process.wait()
        assert life_of(session) is Life.OVER
    finally:
        process.kill()


def test_a_recycled_pid_is_no_life() -> None:
    boot, namespace, pid, started, word = new_session().split("_")
    assert life_of("_".join([boot, namespace, pid, started, word])) is Life.GOING_ON
    assert life_of("_".join([boot, namespace, pid, str(int(started) - 1), word])) is Life.OVER


@pytest.mark.parametrize("place", [0, 1])
def test_nothing_is_known_of_another_machine_or_pid_namespace(place: int) -> None:
    parts = new_session().split("_")
    parts[place] = "other"
    assert life_of("_".join(parts)) is Life.UNKNOWN


@pytest.mark.parametrize("name", ["", "earlier", "a_b_c_d_e", "0123456789abcdef0123456789abcdef"])
def test_nothing_is_known_of_other_names(name: str) -> None:
    assert life_of(name) is Life.UNKNOWN


def test_each_session_has_its_own_name() -> None:
    assert new_session() != new_session()
