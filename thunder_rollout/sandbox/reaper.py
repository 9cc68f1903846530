"""Removes what a run leaves behind when it dies; a process of its own, started by the host.

    python -m thunder_rollout.sandbox.reaper --run R --session S --backend docker --pids 12 34

It waits until one of the processes is gone (the driver, the sandbox host), then removes every
sandbox with that run and session, watching for late ones a little longer, and exits. It is the
second line: sandboxes end by themselves with the process that started them.
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
from pathlib import Path

from thunder_rollout.errors import SandboxFailed, ThunderError

PATIENCE_S = 30.0  # an engine may not answer at once
QUIET_S = 2.0  # nothing found for so long: nothing comes any more
_POLL_S = 0.5


def sweep(run: str, *, backend: str, docker_host: str | None, session: str = "", keep: str = "") -> int:
    """Remove sandboxes of `run`: those of `session`, or (without) all but those of `keep`.

    Returns how many. Blocking, bounded; idempotent.
    """
    if backend == "docker":
        from thunder_rollout.sandbox.docker_engine import sweep_docker

        return sweep_docker(docker_host, run, lambda found: found == session if session else found != keep)
    from thunder_rollout.sandbox.local import sweep_local

    return sweep_local(run, lambda found: found == session if session else found != keep)


class Reaper:
    """A running reaper that is not our child: Ray kills a worker's children with it."""

    def __init__(self, *, run: str, session: str, backend: str, docker_host: str | None, pids: list[int]) -> None:
        """Blocking: it is watching when this returns. Raises `SandboxFailed` if it can't run."""
        argv = [sys.executable, "-m", __spec__.name, "--run", run, "--session", session, "--backend", backend]
        argv += ["--docker-host", docker_host] if docker_host else []
        argv += ["--detach", "--pids", *map(str, pids)]
        package_root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            argv, capture_output=True, stdin=subprocess.DEVNULL, cwd="/", env=os.environ | {"PYTHONPATH": path}
        )
        if done.returncode != 0:
            raise SandboxFailed(f"sandbox: its reaper does not start: {done.stderr.decode(errors='replace')[-500:]}")
        self.pid = int(done.stdout)
        self._pidfd: int | None = os.pidfd_open(self.pid)

    def is_running(self) -> bool:
        return self._pidfd is not None and not select.select([self._pidfd], [], [], 0)[0]

    def stop(self) -> None:
        """For when all sandboxes are stopped in good order. Idempotent."""
        if self._pidfd is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        os.close(self._pidfd)
        self._pidfd = None


def wait_for_any(pids: list[int]) -> None:
    """Return when one of the processes has ended (or was never there)."""
    poller = select.poll()
    descriptors = []
    try:
        for pid in pids:
            descriptors.append(os.pidfd_open(pid))
            poller.register(descriptors[-1], select.POLLIN)
        poller.poll()
    except ProcessLookupError:
        return
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def reap(run: str, session: str, *, backend: str, docker_host: str | None) -> None:
    began_s = last_found_s = time.monotonic()
    while (now_s := time.monotonic()) - last_found_s < QUIET_S and now_s - began_s < PATIENCE_S:
        try:
            if sweep(run, backend=backend, docker_host=docker_host, session=session):
                last_found_s = time.monotonic()
        except ThunderError:  # the engine doesn't answer: it may yet
            last_found_s = time.monotonic()
        time.sleep(_POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m thunder_rollout.sandbox.reaper", description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--session", required=True)
    parser.add_argument("--backend", choices=("docker", "local"), required=True)
    parser.add_argument("--docker-host")
    parser.add_argument("--pids", type=int, nargs="+", required=True)
    parser.add_argument("--detach", action="store_true", help="go on in the background; print the process id")
    options = parser.parse_args()
    if options.detach:
        _detach()
    wait_for_any(options.pids)
    reap(options.run, options.session, backend=options.backend, docker_host=options.docker_host)


def _detach() -> None:
    pid = os.fork()
    if pid:
        os.write(1, str(pid).encode())
        os._exit(0)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)


if __name__ == "__main__":
    main()
