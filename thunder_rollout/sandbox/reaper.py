"""Removes what a run leaves behind when it dies; a process of its own, started by the host.

    python -m thunder_rollout.sandbox.reaper --run R --session S --backend docker --pids 12 34

It waits until one of the processes is gone (the driver, the sandbox host), or until the driver's
heartbeats, which the host passes on through a pipe, have stopped: that is how it hears of a driver on
another node. Then it removes every sandbox with that run and session, watching for late ones a
little longer, and exits. It is the second line: sandboxes end by themselves with the process that
started them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from thunder_rollout.errors import SandboxFailed, ThunderError
from thunder_rollout.sandbox.session import Life, life_of

PATIENCE_S = 120.0  # an engine may be starting again, or refuse for a while
QUIET_S = 2.0  # nothing found for so long: nothing comes any more
_POLL_S = 0.5
_BEATS_BYTES = 65_536


def sweep(
    run: str | None, *, backend: str, docker_host: str | None, is_ours: Callable[[str], bool] = lambda session: True
) -> int:
    """Remove sandboxes of `run` (None: of any) whose session `is_ours` accepts.

    Returns about how many. Raises `ThunderError` or `OSError` where some may be left. Blocking, bounded;
    idempotent.
    """
    if backend == "docker":
        from thunder_rollout.sandbox.docker_engine import sweep_docker

        return sweep_docker(docker_host, run, is_ours)
    from thunder_rollout.sandbox.local import sweep_local

    return sweep_local(run, is_ours)


def sweep_leftovers(*, backend: str, docker_host: str | None) -> int:
    """What a starting host removes: all whose host has surely died, of whatever run. Of another machine's hosts
    nobody knows here, and they may share the engine. As `sweep`."""
    return sweep(None, backend=backend, docker_host=docker_host, is_ours=lambda session: life_of(session) is Life.OVER)


class Reaper:
    """A running reaper that is not our child: Ray kills a worker's children with it."""

    def __init__(
        self,
        *,
        run: str,
        session: str,
        backend: str,
        docker_host: str | None,
        pids: list[int],
        lost_after_s: float | None = None,
    ) -> None:
        """`lost_after_s` without a `beat`, counted from the first one, mean a dead driver.

        Blocking: it is watching when this returns. Raises `SandboxFailed` if it can't run.
        """
        argv = [sys.executable, "-m", __spec__.name, "--run", run, "--session", session, "--backend", backend]
        argv += ["--docker-host", docker_host] if docker_host else []
        argv += ["--lost-after-s", str(lost_after_s)] if lost_after_s else []
        argv += ["--detach", "--pids", *map(str, pids)]
        package_root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        beats, self._beats = os.pipe()
        os.set_blocking(self._beats, False)
        try:
            done = subprocess.run(
                argv, capture_output=True, stdin=beats, cwd="/", env=os.environ | {"PYTHONPATH": path}
            )
        finally:
            os.close(beats)
        if done.returncode != 0:
            os.close(self._beats)
            raise SandboxFailed(f"sandbox: its reaper does not start: {done.stderr.decode(errors='replace')[-500:]}")
        self.pid = int(done.stdout)
        self._pidfd: int | None = os.pidfd_open(self.pid)

    def beat(self) -> None:
        """Tell it that the driver lives."""
        if self._pidfd is not None:
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._beats, b".")

    def is_running(self) -> bool:
        return self._pidfd is not None and not select.select([self._pidfd], [], [], 0)[0]

    def stop(self) -> None:
        """For when all sandboxes are stopped in good order. Idempotent."""
        if self._pidfd is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        os.close(self._pidfd)
        os.close(self._beats)
        self._pidfd = None


def wait_for_end(pids: list[int], *, beats: int | None = None, lost_after_s: float = 0.0) -> None:
    """Return when one of the processes has ended (or was never there), when the pipe `beats` is
    closed, or when it has brought something and then nothing for `lost_after_s`."""
    with contextlib.ExitStack() as stack:
        poller = select.poll()
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                return
            stack.callback(os.close, descriptor)
            poller.register(descriptor, select.POLLIN)
        if beats is not None:
            poller.register(beats, select.POLLIN)
        timeout_ms: float | None = None
        while ready := poller.poll(timeout_ms):
            if any(descriptor != beats for descriptor, _ in ready) or not os.read(ready[0][0], _BEATS_BYTES):
                return
            timeout_ms = lost_after_s * 1000


def reap(run: str, session: str, *, backend: str, docker_host: str | None) -> None:
    def is_ours(found: str) -> bool:
        return found == session

    began_s = last_found_s = time.monotonic()
    while (now_s := time.monotonic()) - last_found_s < QUIET_S and now_s - began_s < PATIENCE_S:
        try:
            if sweep(run, backend=backend, docker_host=docker_host, is_ours=is_ours):
                last_found_s = time.monotonic()
        except (ThunderError, OSError):  # the engine doesn't answer, or keeps something: it may yet
            last_found_s = time.monotonic()
        time.sleep(_POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m thunder_rollout.sandbox.reaper", description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--session", required=True)
    parser.add_argument("--backend", choices=("docker", "local"), required=True)
    parser.add_argument("--docker-host")
    parser.add_argument("--pids", type=int, nargs="+", required=True)
    parser.add_argument("--lost-after-s", type=float, help="stdin brings heartbeats: wait no longer for the next")
    parser.add_argument("--detach", action="store_true", help="go on in the background; print the process id")
    options = parser.parse_args()
    if options.detach:
        _detach()
    lost_after_s = options.lost_after_s
    wait_for_end(options.pids, beats=0 if lost_after_s else None, lost_after_s=lost_after_s or 0.0)
    reap(options.run, options.session, backend=options.backend, docker_host=options.docker_host)


def _detach() -> None:
    pid = os.fork()
    if pid:
        os.write(1, str(pid).encode())
        os._exit(0)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):  # 0 brings the heartbeats
        os.dup2(nothing, descriptor)


if __name__ == "__main__":
    main()
