"""What every command in a sandbox finds in its environment, whatever the backend."""

from __future__ import annotations

from thunder_rollout.sandbox.protocol import SandboxLimits

# Each of these starts as many threads as the machine has cores, where nobody says otherwise.
_THREAD_POOLS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "GOMAXPROCS",
)
_GIT = {
    "safe.directory": "*",
    "user.name": "agent",
    "user.email": "agent@localhost",
    "init.defaultBranch": "main",
}


def common_variables(limits: SandboxLimits) -> dict[str, str]:
    """No more threads than the sandbox has CPUs (at least one), a git that trusts the tree."""
    num_threads = str(max(1, int(limits.cpus)))
    found = {"PYTHONDONTWRITEBYTECODE": "1"} | dict.fromkeys(_THREAD_POOLS, num_threads)
    found["GIT_CONFIG_COUNT"] = str(len(_GIT))
    for index, (key, value) in enumerate(_GIT.items()):
        found |= {f"GIT_CONFIG_KEY_{index}": key, f"GIT_CONFIG_VALUE_{index}": value}
    return found
