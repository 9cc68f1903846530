"""The sandbox seam: a place where an agent's commands run, apart from the host.

`DockerSandbox` and `LocalSandbox` honour it (the same contract tests run on both).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    memory_bytes: int = 2 * 1024**3
    cpus: float = 1.0  # more than the node has are as many as it has
    pids: int = 256
    disk_bytes: int = 1024**3
    output_bytes: int = 16_384  # an observation beyond it is cut in its middle
    ttl_s: float = 86_400.0  # it ends by itself then, whatever waits for it: the last resort where a reaper is dead too

    def on_node(self, num_cpus: int | None) -> SandboxLimits:
        """As a node of so many CPUs (None: nobody knows) can give them."""
        return replace(self, cpus=min(self.cpus, num_cpus)) if num_cpus else self


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """What to start.

    `image` names a Docker image (ignored by `local`, which shows the host's own programs read
    only). `files` maps absolute paths to contents put in place first; then `setup`, one shell
    command, runs once as root in `/`. `workdir` is where commands run; it must exist after setup.
    With a `base_commit`, the repository there then loses all but that commit and its past (see
    `gitscrub`): no later commit, remote, reflog, stash or unreferenced object is left to read an
    answer from. Changes that the image came with are one commit on top of it. `hidden_modules` (top-level
    names) are the task's own, of which `local`, which shows the host's installed packages, shows no other copy.
    `labels` mark everything the sandbox owns (run, program, task).
    """

    image: str
    workdir: str = "/testbed"
    files: dict[str, bytes] = field(default_factory=dict)
    setup: str = ""
    setup_timeout_s: float = 120.0
    base_commit: str = ""
    hidden_modules: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    limits: SandboxLimits = field(default_factory=SandboxLimits)
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """`output` is stdout and stderr as one, undecodable bytes replaced, cut in its middle beyond
    `limits.output_bytes`. A command that timed out has been killed with its children and has
    exit code 124."""

    exit_code: int
    output: str
    timed_out: bool
    took_s: float


class Rest(IntEnum):
    """What a sandbox takes up while its program waits, from much to little. Files are kept by all three;
    processes that commands left behind go on with KEEP, stand still with FREEZE, end with STOP."""

    KEEP = 0
    FREEZE = 1
    STOP = 2


class Sandbox(Protocol):
    async def start(self) -> None:
        """Ready to exec when it returns. Raises `SandboxFailed`."""

    async def exec(self, command: str, *, timeout_s: float) -> ExecResult:
        """Run `command` with bash in the workdir. Each call is a new shell. Whatever the command
        does is an observation; raises `SandboxFailed` only if the sandbox itself is gone."""

    async def read_file(self, path: str) -> bytes:
        """Raises `FileNotFoundError`; `SandboxFailed` if the sandbox is gone."""

    async def write_file(self, path: str, content: bytes) -> None: ...

    async def diff(self, base_commit: str) -> bytes:
        """The workdir's changes since `base_commit` as a binary git patch, untracked files
        included; b"" if nothing changed. Raises `UndiffableChanges` if the agent's doings are in the way."""

    async def clear(self) -> None:
        """End every process that commands left behind; files stay."""

    async def stop(self) -> None:
        """Remove everything the sandbox owns. Idempotent, bounded in time, shielded. Raises `SandboxFailed` where
        something is left; a further call tries again."""


class HostedSandbox(Sandbox, Protocol):
    """What a sandbox host runs."""

    async def is_alive(self) -> bool:
        """Whether it could run a command now; runs none to find out."""

    async def rest(self, how: Rest) -> Rest:
        """Take up less until the next call of any kind, which wakes it first; that is no part of a command's time.

        After the command under way, if any. KEEP wakes it. A rest is never made lighter, and as deep only as
        can be had: returns how deep it is. The time to live goes on: a sandbox that rests when it is over is
        stopped. Raises `SandboxFailed` if the sandbox is gone."""
