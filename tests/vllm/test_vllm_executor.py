"""Our executor over processes that only sleep: how the core ends when one of them does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest

from thunder_rollout.engine.exit_codes import ended_from_outside

NUM_WORKERS = 2
FAILED = 1  # the exit code of a core that says that its executor failed


def core(told: Connection) -> None:
    """In a process of its own: an executor with workers, watched as vLLM watches them."""
    from thunder_rollout.engine.vllm_executor import OwnedMultiprocExecutor

    executor = OwnedMultiprocExecutor.__new__(OwnedMultiprocExecutor)
    executor.is_failed = False
    processes = [multiprocessing.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(NUM_WORKERS)]
    for process in processes:
        process.start()
    executor.workers = [SimpleNamespace(proc=p, death_writer=None, worker_response_mq=None) for p in processes]
    executor.failure_callback = lambda: os._exit(FAILED)
    executor.start_worker_monitor()
    told.send([process.pid for process in processes])
    time.sleep(60)


@pytest.mark.parametrize(
    ("fault", "code"),
    [(signal.SIGTERM, -signal.SIGKILL), (signal.SIGSEGV, FAILED)],
    ids=["from outside", "at its work"],
)
def test_the_core_ends_as_its_worker_did(fault: signal.Signals, code: int) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=core, args=(theirs,))
    process.start()
    workers = ours.recv()
    os.kill(workers[-1], fault)
    process.join(timeout=30)
    try:
        assert process.exitcode == code
        assert ended_from_outside(process.exitcode) == (code != FAILED)
    finally:
        for pid in workers:  # nobody is left to reap them
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_worker_that_is_gone_has_its_exit_code() -> None:
    """Where its sentinel tells first."""
    from thunder_rollout.engine.vllm_executor import _ended

    class Ending:
        exitcode: int | None = None

        def __init__(self) -> None:
            self.sentinel, self._theirs = multiprocessing.Pipe()

        def end(self) -> None:
            self._theirs.close()

        def join(self, timeout: float) -> None:
            self.exitcode = -signal.SIGKILL

    killed, alive = Ending(), Ending()
    killed.end()
    assert _ended([killed, alive]) == [killed]
    assert (killed.exitcode, alive.exitcode) == (-signal.SIGKILL, None)
