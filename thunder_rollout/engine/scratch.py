"""A folder of its own for each engine, for what vLLM would leave in the temporary one: sockets and rendezvous files.

Contract: the folder goes with `close`. The folder of an engine whose process was killed goes when the same user's
next engine starts on that machine. A living owner holds a lock in its folder, which the kernel drops with the
process, so that no process id is needed, which other containers could not judge. Folders of other users stay.

Who holds the lock on the file that is in the folder now may remove the folder, and nobody else.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

PREFIX = "thunder-engine-"
_LOCK = "lock"
_VARIABLE = "VLLM_RPC_BASE_PATH"
_SOCKET_PATH_BYTES = 107  # the longest that the kernel takes
_OWN_BYTES = len(f"/{PREFIX}12345678/{uuid4()}")  # of that, below the temporary folder

_loading = threading.Lock()  # the environment is the process's


class Scratch:
    """`path` is this engine's, in `base` or the temporary folder. Raises `OSError` if it can't be made or locked."""

    def __init__(self, base: Path | None = None) -> None:
        base = base or _base()
        _sweep(base)
        self.path, self._lock = _make(base)

    @contextmanager
    def for_vllm(self) -> Iterator[None]:
        """The processes that vLLM starts meanwhile keep their files here. Engines of one process load in turn."""
        with _loading:
            before = os.environ.get(_VARIABLE)
            os.environ[_VARIABLE] = str(self.path)
            try:
                yield
            finally:
                if before is None:
                    del os.environ[_VARIABLE]
                else:
                    os.environ[_VARIABLE] = before

    def close(self) -> None:
        """Idempotent."""
        if not self._lock.closed:
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()


def _base() -> Path:
    """The temporary folder, or /tmp where paths of sockets below it would be too long."""
    base = tempfile.gettempdir()
    return Path(base if len(os.fsencode(base)) + _OWN_BYTES <= _SOCKET_PATH_BYTES else "/tmp")


def _make(base: Path) -> tuple[Path, IO[str]]:
    while True:  # another engine's sweep may come between the folder and its lock
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        if (lock := _locked(path)) is not None:
            return path, lock


def _locked(folder: Path) -> IO[str] | None:
    """The open file that holds the folder's lock; None where another holds it or the folder is gone."""
    path = folder / _LOCK
    with ExitStack() as opened, suppress(BlockingIOError, FileNotFoundError):
        lock = opened.enter_context(path.open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            opened.pop_all()
            return lock
    return None


def _sweep(base: Path) -> None:
    with os.scandir(base) as entries:
        found = [entry for entry in entries if entry.name.startswith(PREFIX)]
    for entry in found:
        with suppress(OSError):  # it is gone meanwhile, or can't be locked there
            if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                _remove_if_free(Path(entry.path))


def _remove_if_free(folder: Path) -> None:
    if (lock := _locked(folder)) is not None:
        with lock:
            shutil.rmtree(folder, ignore_errors=True)
