"""Sandboxes out of Linux namespaces alone: no Docker engine, no image, nothing to install.

What it isolates: files (only the host's programs and interpreter are seen, read only), network
(none but loopback), processes, ipc, host name, and privileges (see `namespaces`). The kernel is
the host's, as with Docker; there is no seccomp filter, and `image` is ignored.

What bounds it: `disk_bytes` is the size of the tmpfs that holds everything the sandbox writes, at
most half of `memory_bytes`, because that is memory. As root with cgroups, `memory_bytes`, `pids`
and `cpus` bind the sandbox as a whole. Without, rlimits stand in: `memory_bytes` of address space
for each process, `pids` processes for the user namespace, and no bound on CPU.

While it rests, its processes are frozen where there is a cgroup, and go on elsewhere; files stay in memory.

Nothing is left on the host: the root has no folder there, and PID 1 ends when the pipe that this
process holds is closed, by `stop`, by an exit or by `kill -9`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import replace

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox import cgroups
from thunder_rollout.sandbox.channel import CHANNEL_SCRIPT, Channel
from thunder_rollout.sandbox.namespaces import exec_argv, inner_env, missing_tools, open_skeleton, start_argv
from thunder_rollout.sandbox.protocol import SandboxSpec
from thunder_rollout.sandbox.shell import ShellSandbox

logger = logging.getLogger(__name__)

_MARKER = "thunder-sandbox:"
_CHUNK_BYTES = 65_536
_FREEZE_PATIENCE_S = 5.0
_RESUME_EVERY_S = 0.1
_PF_EXITING = 0x4  # linux/sched.h, the flags of /proc/<pid>/stat
_REMEDY = (
    "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces>0, "
    "kernel.apparmor_restrict_unprivileged_userns=0), run as root, or use sandbox.backend=docker"
)


class LocalSandbox(ShellSandbox):
    def __init__(self, spec: SandboxSpec, *, start_timeout_s: float = 120.0) -> None:
        spec = replace(spec, limits=spec.limits.on_node(os.cpu_count()))
        super().__init__(spec, start_timeout_s=start_timeout_s)
        self._name = uuid.uuid4().hex[:16]
        self._cgroup: cgroups.Cgroup | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._init_pid = 0
        self._control = -1  # the write end of PID 1's stdin
        self._entered: list[_Bash] = []  # all channels whose `nsenter` may still be there

    async def _boot(self) -> None:
        run, session = self.spec.labels.get("run", "none"), self.spec.labels.get("session", "none")
        limits = self.spec.limits
        self._cgroup = cgroups.create(run, f"{cgroups.safe_name(session).replace('-', '_')}-{self._name}", limits)
        reader, self._control = os.pipe()
        os.set_blocking(self._control, False)
        skeleton = open_skeleton(self.spec.hidden_modules)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *start_argv(limits, skeleton=skeleton, procs_files=self._procs_files(), marker=_marker(run, session)),
                pass_fds=[skeleton],
                stdin=reader,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=inner_env(limits) | {"PATH": _tool_path()},
                cwd="/",
            )
        finally:
            os.close(reader)
            os.close(skeleton)
        assert self._process.stdout is not None and self._process.stderr is not None
        ready = await self._process.stdout.readline()
        if not ready.startswith(b"ready "):
            text = (await self._process.stderr.read()).decode("utf-8", "replace").strip()
            raise SandboxFailed(f"sandbox: no namespaces for it ({text or 'no message'}); {_REMEDY}")
        self._init_pid = int(ready.split()[1])

    async def _open(self) -> Channel:
        self._require_init()
        script = CHANNEL_SCRIPT if self._cgroup is not None else self._rlimits() + CHANNEL_SCRIPT
        reader, writer = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *exec_argv(self._init_pid, script, procs_files=self._procs_files()),
                stdin=subprocess.PIPE,
                stdout=writer,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=inner_env(self.spec.limits),
                cwd="/",
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._entered = [bash for bash in self._entered if bash.process.returncode is None]
        self._entered.append(bash := _Bash(process, reader))
        return bash

    async def _code_of(self, channel: Channel) -> int:
        assert isinstance(channel, _Bash)
        channel.close()
        code = await channel.process.wait()
        self._require_init()
        return 128 - code if code < 0 else code

    async def _clear(self) -> None:
        if self._control >= 0:
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._control, b"kill\n")
        self._resume()

    def _resume(self) -> None:
        """`nsenter` stays outside, stops when its bash is stopped, and must reap it: PID 1 waits for that, and
        the host's init, which would inherit it, may take its time."""
        for bash in self._entered:
            bash.resume()

    async def _require_alive(self) -> None:
        self._require_init()

    def _require_init(self) -> None:
        if self._process is None or self._process.returncode is not None or not _is_alive(self._init_pid):
            raise SandboxFailed("sandbox: it died (its PID 1 is gone: time to live over, out of memory, or killed)")

    def _procs_files(self) -> list[str]:
        return self._cgroup.procs_files() if self._cgroup else []

    def _rlimits(self) -> str:
        limits = self.spec.limits
        return f"ulimit -v {limits.memory_bytes // 1024} -u {limits.pids}\n"

    def _kill_init(self) -> None:
        """The pid namespace takes the rest along, and `unshare` ends when PID 1 has."""
        if self._process is None or self._process.returncode is not None:
            return
        if self._init_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init_pid, signal.SIGKILL)
        else:
            self._process.kill()  # not ready yet: --kill-child passes it on

    async def _end(self) -> None:
        self._kill_init()

    async def _freeze(self) -> bool:
        if self._cgroup is None or not self._cgroup.freeze():
            return False
        try:
            async with asyncio.timeout(_FREEZE_PATIENCE_S):
                await _until(self._cgroup.is_frozen)
        except TimeoutError:
            self._cgroup.thaw()
            return False
        return True

    async def _thaw(self) -> None:
        if self._cgroup is not None:
            self._cgroup.thaw()
        self._require_init()

    async def _put_away(self) -> bool:
        """The tree is PID 1's, which stays."""
        await self._end_processes()
        self._close_channel()
        await self._freeze()
        return True

    async def _start_again(self) -> None:
        await self._thaw()

    async def _destroy(self) -> None:
        if self._control >= 0:
            os.close(self._control)
            self._control = -1
        if self._process is not None:
            self._kill_init()
            if self._cgroup is not None:
                self._cgroup.thaw()
            while self._process.returncode is None:
                self._resume()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), _RESUME_EVERY_S)
        for bash in self._entered:
            await bash.process.wait()
        if self._cgroup is not None:
            await _until(self._cgroup.remove)


def local_unavailable() -> str | None:
    """Why local sandboxes can't run here and what to do; None if they can. Blocking, fast."""
    missing = missing_tools()
    if missing:
        return f"missing programs: {', '.join(missing)}; install util-linux, bash, git and tar"
    namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts"]
    if os.geteuid() != 0:
        namespaces += ["--user", "--map-root-user"]
    try:
        probe = subprocess.run(
            ["unshare", *namespaces, "--fork", "true"], capture_output=True, timeout=10, env={"PATH": _tool_path()}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unshare failed ({error}); {_REMEDY}"
    if probe.returncode != 0:
        return f"{probe.stderr.decode('utf-8', 'replace').strip()}; {_REMEDY}"
    return None


def sweep_local(run: str | None, is_ours: Callable[[str], bool]) -> int:
    """Kill what is left on this host of the local sandboxes of `run` (None: of any) whose session `is_ours`
    accepts; about how many. Blocking, bounded."""
    prefix = _marker(run, "") if run else _MARKER
    found = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit() and any(
            part.startswith(prefix) and is_ours(part.rpartition(":")[2]) for part in _command_line(entry)
        ):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(entry), signal.SIGKILL)
                found += 1
    return max(found, cgroups.sweep(run, is_ours))


def _marker(run: str, session: str) -> str:
    """Stands in the command lines of a local sandbox's first processes, for `sweep_local`."""
    return f"{_MARKER}{cgroups.safe_name(run)}:{session and cgroups.safe_name(session)}"


def _is_alive(pid: int) -> bool:
    """False also for a process that has begun to exit: PID 1 goes last in its namespace."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *_, flags = file.read().rpartition(")")[2].split()[:7]
    except OSError:
        return False
    return state not in "ZX" and not int(flags) & _PF_EXITING


def _command_line(pid: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode("utf-8", "replace").split("\0")
    except OSError:
        return []


def _tool_path() -> str:
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


class _Bash:
    """The `Channel` of a local sandbox. Its stdout is a pipe of our own: asyncio's would count as open, and the
    process as running, for as long as a daemon holds it."""

    def __init__(self, process: asyncio.subprocess.Process, reader: int) -> None:
        self.process = process
        self._reader = reader
        self._pidfd = -1
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            self._pidfd = os.pidfd_open(process.pid)
        os.set_blocking(reader, False)

    async def send(self, content: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(content)
        await self.process.stdin.drain()

    async def read(self) -> bytes:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return os.read(self._reader, _CHUNK_BYTES)
            except BlockingIOError:
                readable = asyncio.Event()
                loop.add_reader(self._reader, readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(self._reader)

    def resume(self) -> None:
        if self.process.returncode is None and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    def __del__(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)


async def _until(done: Callable[[], bool], every_s: float = 0.005) -> None:
    for _ in itertools.count():
        if done():
            return
        await asyncio.sleep(every_s)
