from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from thunder_rollout.engine import scratch
from thunder_rollout.engine.scratch import PREFIX, Scratch

_OWNER = """
import sys, time
from pathlib import Path
from thunder_rollout.engine.scratch import Scratch

scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "socket").touch()
print(scratch.path, flush=True)
time.sleep(1000)
"""


def engine_folders(base: Path) -> set[Path]:
    return set(base.glob(f"{PREFIX}*"))


def leave_folder(base: Path, name: str = "dead") -> Path:
    """As an owner that was killed."""
    folder = base / f"{PREFIX}{name}"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "socket").touch()
    return folder


def test_the_folder_goes_with_its_engine(tmp_path: Path) -> None:
    first, second = Scratch(tmp_path), Scratch(tmp_path)
    assert engine_folders(tmp_path) == {first.path, second.path}
    (first.path / "socket").touch()
    first.close()
    first.close()
    assert engine_folders(tmp_path) == {second.path}
    second.close()


def test_a_killed_owners_folder_goes_at_the_next_start_and_a_living_ones_stays(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", _OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        try:
            assert owner.stdout is not None
            theirs = Path(owner.stdout.readline().strip())
            first = Scratch(tmp_path)
            assert engine_folders(tmp_path) == {theirs, first.path}
            assert (theirs / "socket").exists()
        finally:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
        second = Scratch(tmp_path)
    assert engine_folders(tmp_path) == {first.path, second.path}
    first.close()
    second.close()


def test_a_folder_whose_owner_died_before_it_locked_goes_too(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}new").mkdir()
    mine = Scratch(tmp_path)
    assert engine_folders(tmp_path) == {mine.path}
    mine.close()


def test_what_is_no_folder_of_an_engine_stays(tmp_path: Path) -> None:
    other, file, link = tmp_path / "other", tmp_path / f"{PREFIX}file", tmp_path / f"{PREFIX}link"
    other.mkdir()
    (other / "kept").touch()
    file.touch()
    link.symlink_to(other)
    Scratch(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {other.name, file.name, link.name}
    assert [path.name for path in other.iterdir()] == ["kept"]


def test_another_users_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = leave_folder(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    Scratch(tmp_path).close()
    assert (theirs / "socket").exists()


@pytest.mark.parametrize("moment", ["before the lock is opened", "before it is taken", "while another holds it"])
def test_a_sweep_between_the_folder_and_its_lock_costs_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    swept, held = [], []
    make, flock = tempfile.mkdtemp, fcntl.flock

    def sweep_once() -> None:
        if not swept:
            swept.extend(engine_folders(tmp_path))
            scratch._sweep(tmp_path)

    def mkdtemp(**options: Any) -> str:
        path = make(**options)
        if moment == "before the lock is opened":
            sweep_once()
        elif moment == "while another holds it" and not held:
            held.append(scratch._locked(Path(path)))
            swept.append(Path(path))
        return path

    def flock_later(*args: Any) -> None:
        if moment == "before it is taken" and not held:
            held.append(None)
            sweep_once()
        flock(*args)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(fcntl, "flock", flock_later)
    mine = Scratch(tmp_path)
    assert len(swept) == 1
    assert mine.path not in swept
    assert (mine.path / "lock").exists()
    assert engine_folders(tmp_path) - {mine.path} == ({swept[0]} if moment == "while another holds it" else set())
    mine.close()
    for lock in held:
        if lock is not None:
            lock.close()


def test_engines_that_start_together_keep_their_folders(tmp_path: Path) -> None:
    for number in range(20):
        leave_folder(tmp_path, str(number))
    with ThreadPoolExecutor(16) as threads:
        started = [thread.result() for thread in [threads.submit(Scratch, tmp_path) for _ in range(64)]]
    assert {one.path for one in started} <= engine_folders(tmp_path)
    assert all((one.path / "lock").exists() for one in started)
    for one in started:
        one.close()
    Scratch(tmp_path).close()
    assert not engine_folders(tmp_path)


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_vllm_keeps_its_files_there_while_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    if before is not None:
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", before)
    mine = Scratch(tmp_path)
    with suppress(ValueError), mine.for_vllm():
        assert os.environ["VLLM_RPC_BASE_PATH"] == str(mine.path)
        assert not scratch._loading.acquire(blocking=False), "another engine of this process would move its files"
        raise ValueError("vLLM fails")
    assert os.environ.get("VLLM_RPC_BASE_PATH") == before
    assert not scratch._loading.locked()
    mine.close()


def test_sockets_fit_under_a_long_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = "/" + "t" * 45
    assert len(f"{longest}/{PREFIX}12345678/{uuid4()}") == 107
    monkeypatch.setattr(tempfile, "tempdir", longest)
    assert scratch._base() == Path(longest)
    monkeypatch.setattr(tempfile, "tempdir", longest + "t")
    assert scratch._base() == Path("/tmp")
    mine = Scratch()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(mine.path / str(uuid4())))
    mine.close()
