from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from thunder_rollout.sandbox import session
from thunder_rollout.sandbox.session import Life, life_of, new_session


def test_a_session_lives_as_long_as_its_process() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    name = new_session(process.pid)
    try:
        assert life_of(name) is Life.GOING_ON
        process.kill()
        process.wait()
        assert life_of(name) is Life.OVER
    finally:
        process.kill()


def test_a_recycled_pid_is_no_life() -> None:
    machine, boot, namespace, pid, started, word = new_session().split("_")
    assert life_of("_".join([machine, boot, namespace, pid, started, word])) is Life.GOING_ON
    assert life_of("_".join([machine, boot, namespace, pid, str(int(started) - 1), word])) is Life.OVER


MACHINE, BOOT, NAMESPACE = range(3)


@pytest.mark.parametrize("others", [(MACHINE, BOOT), (MACHINE, BOOT, NAMESPACE), (NAMESPACE,)])
def test_nothing_is_known_of_another_machine_or_pid_namespace(others: tuple[int, ...]) -> None:
    parts = new_session().split("_")
    for place in others:
        parts[place] = "other"
    assert life_of("_".join(parts)) is Life.UNKNOWN


@pytest.mark.parametrize(("machine_id", "life"), [("0123456789abcdef\n", Life.OVER), ("", Life.UNKNOWN)])
def test_an_earlier_boot_of_this_machine_is_over_where_the_machine_has_an_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine_id: str, life: Life
) -> None:
    (tmp_path / "machine-id").write_text(machine_id)
    monkeypatch.setattr(session, "_MACHINE_ID", str(tmp_path / "machine-id"))
    machine, _, *rest = new_session().split("_")
    assert life_of("_".join([machine, "earlier", *rest])) is life
    monkeypatch.setattr("socket.gethostname", lambda: "a-copy-of-this-machine")
    assert life_of("_".join([machine, "earlier", *rest])) is Life.UNKNOWN


def test_a_machine_without_an_id_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_MACHINE_ID", "/no/such/file")
    machine, _, *rest = new_session().split("_")
    assert life_of("_".join([machine, "earlier", *rest])) is Life.UNKNOWN


@pytest.mark.parametrize("name", ["", "earlier", "a_b_c_d_e_f", "0123456789abcdef0123456789abcdef"])
def test_nothing_is_known_of_other_names(name: str) -> None:
    assert life_of(name) is Life.UNKNOWN


def test_each_session_has_its_own_name() -> None:
    assert new_session() != new_session()
