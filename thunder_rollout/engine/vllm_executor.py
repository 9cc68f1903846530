"""vLLM executors that end with the process that owns the engine, and as their workers end.

vLLM's engine core is a process of its own and does not notice that its parent is gone: after a
`kill -9` it would hold its memory, and its GPUs, for ever. Executors are vLLM's extension point that
runs inside that process, so the watch is put there; the workers below it end with it by themselves.

Where a worker process is gone, vLLM fails the core as if its work had failed. Where it was killed from
outside the core is killed as well, so that whoever looks at its exit code sees what happened.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from thunder_rollout.engine.exit_codes import ended_from_outside

logger = logging.getLogger(__name__)

_POLL_S = 0.5


class OwnedMultiprocExecutor(MultiprocExecutor):
    def _init_executor(self) -> None:
        _end_with_parent()
        super()._init_executor()

    def shutdown(self) -> None:
        """The first thing that vLLM does about a worker that is gone, before it ends the others."""
        if self.is_failed:
            gone = [worker.proc for worker in self.workers if worker.proc.exitcode is not None]
            if gone and all(ended_from_outside(process.exitcode) for process in gone):
                logger.error("%s was ended from outside: the engine core ends too", gone[0].name)
                os.kill(os.getpid(), signal.SIGKILL)
        super().shutdown()


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
