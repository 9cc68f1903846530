"""vLLM executors that end with the process that owns the engine, and as their workers end.

vLLM's engine core is a process of its own and does not notice that its parent is gone: after a
`kill -9` it would hold its memory, and its GPUs, for ever. Executors are vLLM's extension point that
runs inside that process, so the watch is put there; the workers below it end with it by themselves.

Where a worker process is gone, vLLM fails the core as if its work had failed. Where it was killed from
outside the core is killed as well, so that whoever looks at its exit code sees what happened.

vLLM puts the file by which an engine's workers find each other into the temporary folder, where it stays if they are
killed; here it lies in the engine's own (`engine.scratch`). `TMPDIR` would move the caches of compiled code as well.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection
from typing import Any
from uuid import uuid4

from vllm import envs
from vllm.v1.executor import multiproc_executor, uniproc_executor

from thunder_rollout.engine.exit_codes import ended_from_outside

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_EXIT_WAIT_S = 2.0


class OwnedMultiprocExecutor(multiproc_executor.MultiprocExecutor):
    def _init_executor(self) -> None:
        _end_with_parent()
        _keep_rendezvous_file(multiproc_executor)
        super()._init_executor()

    def shutdown(self) -> None:
        """The first thing that vLLM does about a worker that is gone, before it ends the others."""
        if self.is_failed:
            gone = _ended([worker.proc for worker in self.workers])
            if gone and all(ended_from_outside(process.exitcode) for process in gone):
                logger.error("%s was ended from outside: the engine core ends too", gone[0].name)
                os.kill(os.getpid(), signal.SIGKILL)
        super().shutdown()


class OwnedUniProcExecutor(uniproc_executor.UniProcExecutor):
    def _init_executor(self) -> None:
        _end_with_parent()
        _keep_rendezvous_file(uniproc_executor)
        super()._init_executor()


def _ended(processes: list[Any]) -> list[Any]:
    """Those that are gone, with their exit codes: the sentinel tells of an end a moment before the code is there."""
    ready = connection.wait([process.sentinel for process in processes], timeout=0)
    gone = [process for process in processes if process.sentinel in ready]
    for process in gone:
        process.join(_EXIT_WAIT_S)
    return gone


def _keep_rendezvous_file(module: Any) -> None:
    module.get_file_store_init_method = lambda: f"file://{envs.VLLM_RPC_BASE_PATH}/vllm_dist_{uuid4().hex}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return  # the engine core runs inside its owner
    threading.Thread(target=_watch, args=(parent.pid,), name="end-with-parent", daemon=True).start()


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
