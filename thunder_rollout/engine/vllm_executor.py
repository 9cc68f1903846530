"""vLLM executors that end with the process that owns the engine.

vLLM's engine core is a process of its own and does not notice that its parent is gone: after a
`kill -9` it would hold its memory, and its GPUs, for ever. Executors are vLLM's extension point that
runs inside that process, so the watch is put there; the workers below it end with it by themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

_POLL_S = 0.5


class OwnedMultiprocExecutor(MultiprocExecutor):
    def _init_executor(self) -> None:
        _end_with_parent()
        super()._init_executor()


class OwnedUniProcExecutor(UniProcExecutor):
    def _init_executor(self) -> None:
        _end_with_parent()
        super()._init_executor()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return  # the engine core runs inside its owner
    threading.Thread(target=_watch, args=(parent.pid,), name="end-with-parent", daemon=True).start()


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
