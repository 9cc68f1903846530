"""What Docker and local sandboxes share: everything is a shell script run inside.

A backend provides a few primitives; `ShellSandbox` makes the `Sandbox` contract out of them. Invariants:
- one command at a time: calls on one sandbox queue up. All go through one channel (see `channel`),
  opened again when a command took it along;
- a command that times out, or whose call is cancelled, takes every process of the sandbox with
  it except PID 1, daemons of earlier commands included. `kill -9 -1` from PID 1 is the one way
  that neither `setsid` nor a fork bomb escapes. A command that ends in time leaves its
  background processes running, as a container would;
- PID 1 is `INIT_SCRIPT`. It ends with its stdin, so with whoever holds the other end, and after
  its time to live; and the sandbox with it. It forks nothing, so no limit stops it.
"""

from __future__ import annotations

import asyncio
import io
import logging
import tarfile
import time
from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from thunder_rollout.errors import SandboxFailed, UndiffableChanges
from thunder_rollout.sandbox.channel import KILLED, NOT_RUNNABLE, CommandRunner
from thunder_rollout.sandbox.gitdiff import DIFF_SCRIPT, NO_BASE, NO_REPOSITORY
from thunder_rollout.sandbox.gitscrub import SCRUB_SCRIPT
from thunder_rollout.sandbox.output import OutputBuffer
from thunder_rollout.sandbox.protocol import ExecResult, Rest, SandboxSpec

logger = logging.getLogger(__name__)

TIMED_OUT = 124
MAX_COMMAND_BYTES = 100_000  # Linux takes 128 KiB in one argument
MAX_FILE_BYTES = 64 * 1024**2  # read_file and diff beyond it are refused, for the host's memory
INTERNAL_TIMEOUT_S = 60.0  # reading and writing files, diffs
DESTROY_TIMEOUT_S = 15.0
_CLEAR_ATTEMPTS = 10

# $1 = time to live in seconds; a line "kill" on stdin ends all other processes. bash blocks SIGCHLD
# inside `read`, so the short timeout is what reaps orphans. Nobody reads what its stdout would bring, which every
# process inside can write to.
INIT_SCRIPT = """
trap '' HUP INT QUIT TERM PIPE
exec >/dev/null 2>&1
while (( SECONDS < $1 )); do
    IFS= read -r -t 0.5 line || (( $? > 128 )) || exit 0
    [[ $line == kill ]] && kill -9 -1
    line=
done
exit 0
"""

# $1 = workdir, $2 = the agent's command. First to be killed when memory runs out.
EXEC_SCRIPT = """
{ echo 500 > /proc/self/oom_score_adj; } 2>/dev/null
cd -- "$1" 2>/dev/null || { echo "bash: cd: $1: the working directory is gone" >&2; cd /; }
exec bash --norc -c "$2"
"""

_MISSING = 44
_READ_SCRIPT = f'[ -f "$1" ] || exit {_MISSING}; exec cat -- "$1"'
_FOLDER_SCRIPT = 'folder=${1%/*}/; { [ -d "$folder" ] || mkdir -p -- "$folder"; }'
_WRITE_SCRIPT = f'{_FOLDER_SCRIPT} && head -c "$2" > "$1"'
_WRITE_SHORT_SCRIPT = f'{_FOLDER_SCRIPT} && printf %s "$2" > "$1"'
_SHORT_BYTES = 4096  # of a text that goes as an argument, which bash reads byte by byte; stdin costs a channel
_UNPACK_SCRIPT = 'head -c "$1" | tar -x -f - -C / --no-same-owner --keep-directory-symlink'
_WORKDIR_SCRIPT = 'cd -- "$1" && { git rev-parse -q --verify HEAD 2>/dev/null || true; }'


class ShellSandbox(CommandRunner):
    """The `Sandbox` contract over shell scripts; see the module's docstring."""

    def __init__(self, spec: SandboxSpec, *, start_timeout_s: float = 120.0) -> None:
        super().__init__()
        self.spec = spec
        self._start_timeout_s = start_timeout_s
        self._lock = asyncio.Lock()
        self._stopping: asyncio.Task[None] | None = None
        self._started = False
        self._rest = Rest.KEEP
        self._stays_up = False  # it can't be put away; asked again after it was awake, for asking wakes it
        self._changing: asyncio.Task[None] | None = None  # of one rest for another
        self._ends_s = 0.0  # its time to live is over then
        self._expiry: asyncio.TimerHandle | None = None
        self._first_head = ""  # HEAD of the workdir when the sandbox started; "" without git

    @abstractmethod
    async def _boot(self) -> None:
        """Bring PID 1 up. Raises `SandboxFailed`. May leave parts behind: `_destroy` follows."""

    @abstractmethod
    async def _require_alive(self) -> None:
        """Raises `SandboxFailed` if PID 1 is gone."""

    @abstractmethod
    async def _destroy(self) -> None:
        """Remove everything the sandbox owns; also after a failed or half-done `_boot`, while it rests, and after a
        try that failed or was cancelled. Raises `SandboxFailed` or `OSError` where something is left."""

    @abstractmethod
    async def _freeze(self) -> bool:
        """Stop all processes where they are; False where that can't be done, and nothing has changed."""

    @abstractmethod
    async def _thaw(self) -> None: ...

    @abstractmethod
    async def _put_away(self) -> bool:
        """End all processes and keep the files; False where they can't be kept without the sandbox running."""

    @abstractmethod
    async def _start_again(self) -> None:
        """After `_put_away`, or after a start again that failed; with what is left of the time to live. Raises
        `SandboxFailed`."""

    async def start(self) -> None:
        if self._started or self._stopping is not None:
            raise SandboxFailed("sandbox: it was started or stopped before; make a new one")
        self._started = True
        self._ends_s = time.monotonic() + self.spec.limits.ttl_s
        try:
            async with self._lock, self._in_time():
                await self._boot()
                await self._populate()
        except BaseException:
            try:
                await self.stop()
            except SandboxFailed as error:  # whoever hears of the start's failure may stop it again
                logger.warning("sandbox: it did not start, and %s", error)
            raise

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Around a start. Raises `SandboxFailed` when it takes too long."""
        try:
            async with asyncio.timeout(self._start_timeout_s):
                yield
        except TimeoutError as error:
            raise SandboxFailed(
                f"sandbox: not ready after {self._start_timeout_s:.0f} s; raise sandbox.start_timeout_s"
            ) from error

    async def _populate(self) -> None:
        spec = self.spec
        if spec.files:
            archive = _tar(spec.files)
            await self._internal(_UNPACK_SCRIPT, str(len(archive)), stdin=archive, what="files")
        if spec.setup:
            await self._set_up(EXEC_SCRIPT, "/", spec.setup, what="the task's setup", env=spec.env)
        if spec.base_commit:
            script = f"cd -- {_quote(spec.workdir)}\n{SCRUB_SCRIPT}"
            await self._set_up(script, spec.base_commit, what=f"reducing the repository to {spec.base_commit}", env={})
        head = await self._internal(_WORKDIR_SCRIPT, spec.workdir, what=f"workdir {spec.workdir!r} must exist")
        self._first_head = head.decode("ascii", "replace").strip()

    async def _set_up(self, script: str, *args: str, what: str, env: dict[str, str]) -> None:
        output = OutputBuffer(4096)
        limit_s = self.spec.setup_timeout_s
        done = await self._run(script, args, stdin=b"", env=env, timeout_s=limit_s, output=output, merge_stderr=True)
        if done.code != 0:
            how = f"took over {limit_s:.0f} s" if done.timed_out else f"exit code {done.code}"
            raise SandboxFailed(f"sandbox: {what} failed ({how}): {output.text()[-1000:]}")

    async def exec(self, command: str, *, timeout_s: float) -> ExecResult:
        problem = _unrunnable(command)
        if problem:
            return ExecResult(exit_code=NOT_RUNNABLE, output=problem, timed_out=False, took_s=0.0)
        output = OutputBuffer(self.spec.limits.output_bytes)
        async with self._lock:
            await self._wake()
            began_s = time.monotonic()
            done = await self._run(
                EXEC_SCRIPT,
                (self.spec.workdir, command.encode("utf-8", "replace").decode()),
                stdin=b"",
                env=self.spec.env,
                timeout_s=timeout_s,
                output=output,
                merge_stderr=True,
            )
        return ExecResult(
            exit_code=TIMED_OUT if done.timed_out else done.code,
            output=output.text(),
            timed_out=done.timed_out,
            took_s=time.monotonic() - began_s,
        )

    async def read_file(self, path: str) -> bytes:
        async with self._lock:
            await self._wake()
            return await self._internal(_READ_SCRIPT, path, what=f"read {path!r}", missing=path)

    async def write_file(self, path: str, content: bytes) -> None:
        async with self._lock:
            await self._wake()
            what = f"write {path!r}"
            if (text := _short_text(content)) is not None:
                await self._internal(_WRITE_SHORT_SCRIPT, path, text, what=what)
            else:
                await self._internal(_WRITE_SCRIPT, path, str(len(content)), stdin=content, what=what)

    async def diff(self, base_commit: str) -> bytes:
        """See `Sandbox.diff`; "HEAD" means the HEAD the sandbox started with. b"" also if the
        agent has destroyed the repository: it leaves no patch. Raises `SandboxFailed` if there
        never was one, or `base_commit` isn't in it; `UndiffableChanges` where a sandbox that goes on can't do
        what it could when it started."""
        base = self._first_head if base_commit == "HEAD" else base_commit
        if not self._first_head:
            raise SandboxFailed(f"sandbox: {self.spec.workdir} is not a git repository with a commit; fix the task")
        async with self._lock:
            await self._wake()
            try:
                return await self._internal(DIFF_SCRIPT, base, what="diff", in_workdir=True)
            except _ScriptFailed as error:
                if error.code == NO_BASE and base != self._first_head:
                    raise
                if error.code not in (NO_REPOSITORY, NO_BASE):
                    await self._require_answer(error)
                    raise UndiffableChanges(f"what the agent left can't be taken as a patch: {error}") from error
                logger.warning("sandbox: the repository in %s is destroyed; no patch", self.spec.workdir)
                return b""

    async def _require_answer(self, failure: _ScriptFailed) -> None:
        """Raises `SandboxFailed` if PID 1 is gone, or all of the sandbox is as slow as what just failed was."""
        await self._require_alive()
        if failure.code == KILLED:
            await self._internal("true", what="answer")

    async def is_alive(self) -> bool:
        """See `HostedSandbox`."""
        try:
            self._require_running()
            if self._rest is not Rest.STOP:
                await self._require_alive()
        except SandboxFailed:
            return False
        return True

    async def clear(self) -> None:
        async with self._lock:
            await self._wake()
            await self._end_processes()

    async def _end_processes(self) -> None:
        await self._clear()
        self._close_channel()
        for _ in range(_CLEAR_ATTEMPTS):  # PID 1 may take the order late, and then this dies of it
            probe = OutputBuffer(0)
            done = await self._run("sleep 0.05", (), stdin=b"", env={}, timeout_s=5.0, output=probe, merge_stderr=False)
            if done.code == 0:
                return
        raise SandboxFailed("sandbox: its processes could not be ended")

    async def rest(self, how: Rest) -> Rest:
        async with self._lock:
            await self._settle()
            if how is Rest.STOP and self._stays_up:
                how = Rest.FREEZE
            if how is Rest.KEEP or how > self._rest:
                await self._come_to(how)
            return self._rest

    async def _wake(self) -> None:
        """Before anything runs inside, under the lock."""
        await self._settle()
        await self._come_to(Rest.KEEP)

    async def _settle(self) -> None:
        if self._changing is not None:
            await asyncio.wait([self._changing])
        self._require_running()

    async def _come_to(self, how: Rest) -> None:
        """Once begun, it goes on though the caller is cancelled; whoever comes next waits for it."""
        if how is not self._rest:
            self._changing = asyncio.create_task(self._change(how), name="rest-sandbox")
            self._changing.add_done_callback(_retrieve)
            await asyncio.shield(self._changing)

    async def _change(self, how: Rest) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        if self._rest is not Rest.KEEP:
            await (self._thaw() if self._rest is Rest.FREEZE else self._start_again())
            self._rest = Rest.KEEP
        self._stays_up = how is Rest.STOP and not await self._put_away()
        if how is Rest.STOP and not self._stays_up:
            self._rest = Rest.STOP
        elif how is not Rest.KEEP and await self._freeze():
            self._rest = Rest.FREEZE
        if self._rest is not Rest.KEEP:  # PID 1 can't see to it
            left_s = max(0.0, self._ends_s - time.monotonic())
            self._expiry = asyncio.get_running_loop().call_later(left_s, self._expire)

    def _expire(self) -> None:
        if self._stopping is None:
            logger.info("sandbox: its time to live is over while it rests")
            self._stopping = asyncio.create_task(self._stop())
            self._stopping.add_done_callback(_retrieve)

    async def stop(self) -> None:
        if self._stopping is None or (self._stopping.done() and _has_failed(self._stopping)):
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        try:
            async with asyncio.timeout(DESTROY_TIMEOUT_S):
                if self._changing is not None:
                    await asyncio.wait([self._changing])
                await self._destroy()
        except OSError as error:
            why = f"within {DESTROY_TIMEOUT_S:.0f} s" if isinstance(error, TimeoutError) else f"({error})"
            raise SandboxFailed(f"sandbox: it was not removed {why}; stop it again") from error
        finally:
            if not self._lock.locked():  # else the command under way sees its end, and closes it
                self._close_channel()

    def _require_running(self) -> None:
        if not self._started or self._stopping is not None:
            raise SandboxFailed("sandbox: not running (never started, or already stopped)")

    async def _internal(
        self,
        script: str,
        *args: str,
        what: str,
        stdin: bytes = b"",
        missing: str | None = None,
        in_workdir: bool = False,
    ) -> bytes:
        """Run our own script; its stdout. A sandbox too full of processes is cleared for it."""
        if any("\0" in arg for arg in args):
            raise FileNotFoundError(missing or what)
        if in_workdir:
            script = f"cd -- {_quote(self.spec.workdir)}\n{script}"
        for attempt in (1, 2):
            output = OutputBuffer(MAX_FILE_BYTES)
            done = await self._run(
                script, args, stdin=stdin, env={}, timeout_s=INTERNAL_TIMEOUT_S, output=output, merge_stderr=False
            )
            if done.code == 0 and not output.cut_bytes:
                return output.content()
            if done.code == 0:
                raise _ScriptFailed(f"sandbox: {what}: over {MAX_FILE_BYTES} bytes")
            if missing is not None and done.code == _MISSING:
                raise FileNotFoundError(missing)
            if attempt == 2 or done.code in (NO_REPOSITORY, NO_BASE):
                break
            await self._clear()
            self._close_channel()
        raise _ScriptFailed(f"sandbox: {what}: failed with exit code {done.code}", done.code)


def _retrieve(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # of a change that nobody waits for any more; the next call finds out


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.cancelled() or task.exception() is not None


class _ScriptFailed(SandboxFailed):
    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


def _unrunnable(command: str) -> str:
    if "\0" in command:
        return "bash: the command contains a NUL character, which no shell can run"
    size_bytes = len(command.encode("utf-8", "replace"))
    if size_bytes > MAX_COMMAND_BYTES:
        return f"bash: the command is too long ({size_bytes} bytes, at most {MAX_COMMAND_BYTES})"
    return ""


def _short_text(content: bytes) -> str | None:
    if len(content) > _SHORT_BYTES or b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in sorted(files.items()):
            if not path.startswith("/"):
                raise SandboxFailed(f"sandbox: files: {path!r} must be an absolute path")
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size = len(content)
            entry.mode = 0o755 if content.startswith(b"#!") else 0o644
            entry.mtime = int(time.time())
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
