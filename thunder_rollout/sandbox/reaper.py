"""Removes what a run leaves behind when it dies; a process of its own, started by the host.

    python -m thunder_rollout.sandbox.reaper --run R --session S --backend docker --pids 12 34

It waits until one of the processes is gone (the driver, the sandbox host), then removes every
sandbox with that run and session, watching for late ones a little longer, and exits. It is the
second line: sandboxes end by themselves with the process that started them.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 30.0  # an engine may not answer at once
QUIET_S = 3.0  # nothing found for so long: nothing comes any more
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


def start_reaper(*, run: str, session: str, backend: str, docker_host: str | None, pids: list[int]) -> subprocess.Popen:
    """Start it detached, so that neither Ctrl-C nor our death reaches it; `terminate` it when
    everything is stopped in good order."""
    argv = [sys.executable, "-m", __spec__.name, "--run", run, "--session", session, "--backend", backend]
    argv += ["--docker-host", docker_host] if docker_host else []
    argv += ["--pids", *map(str, pids)]
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env=os.environ | {"PYTHONPATH": path},
    )


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
    from thunder_rollout.errors import ThunderError

    began_s = last_found_s = time.monotonic()
    while (now_s := time.monotonic()) - last_found_s < QUIET_S and now_s - began_s < PATIENCE_S:
        try:
            if sweep(run, backend=backend, docker_host=docker_host, session=session):
                last_found_s = time.monotonic()
        except ThunderError:
            last_found_s = time.monotonic()  # the engine doesn't answer: it may yet
        time.sleep(_POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m thunder_rollout.sandbox.reaper", description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--session", required=True)
    parser.add_argument("--backend", choices=("docker", "local"), required=True)
    parser.add_argument("--docker-host")
    parser.add_argument("--pids", type=int, nargs="+", required=True)
    options = parser.parse_args()
    wait_for_any(options.pids)
    reap(options.run, options.session, backend=options.backend, docker_host=options.docker_host)


if __name__ == "__main__":
    main()
