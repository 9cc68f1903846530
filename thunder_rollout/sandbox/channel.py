"""One long-lived way into a sandbox, through which commands follow each other.

A new process inside costs tens of milliseconds of an engine's work (see `recipes/sandbox_density`), so
one bash is started inside and reads requests from its stdin. Its stdout carries, for each, a marker of
the request's own, what the command printed, the marker again and the exit code. What lies before the
first marker belongs to nobody: daemons of earlier commands may have printed it. A daemon that prints
after its command has ended gets SIGPIPE once the next command begins.

The bash ends with its stdin; it may be killed at any time, by a command too, which the client sees as
the end of its stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from thunder_rollout.sandbox.output import OutputBuffer

# Each command's output runs through a `cat` of its own, or daemons would hold the channel's stdout. The
# last request's command reads the rest of our stdin; what it leaves there must not be taken for a request.
CHANNEL_SCRIPT = r"""
exec 2>/dev/null
while IFS= read -r -d '' marker && IFS= read -r -d '' mode && IFS= read -r -d '' count; do
    words=()
    while (( ${#words[@]} < count )); do IFS= read -r -d '' word || exit; words+=("$word"); done
    if [[ $copier ]]; then kill -9 "$copier"; wait "$copier"; fi
    printf %s "$marker"
    exec 3> >(exec cat)
    copier=$!
    case $mode in
        merged) "${words[@]}" >&3 2>&1 3>&- </dev/null ;;
        stdout) "${words[@]}" >&3 2>/dev/null 3>&- </dev/null ;;
        last) "${words[@]}" >&3 2>/dev/null 3>&- ;;
    esac
    printf '%s%d;' "$marker" "$?" >&3
    exec 3>&-
    if [[ $mode == last ]]; then exec cat >/dev/null; fi
done
"""

NOT_RUNNABLE = 126
KILLED = 137
_MAX_CODE_BYTES = 4
_KILL_EVERY_S = 0.5
_KILL_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    code: int
    timed_out: bool


class NotRunnable(Exception):
    """Nothing can be started inside just now: what the agent has done to its sandbox."""


class Channel(Protocol):
    """Stdin and stdout of a bash that runs `CHANNEL_SCRIPT` inside."""

    async def send(self, content: bytes) -> None:
        """Raises `BrokenPipeError` or `ConnectionResetError` if the bash is gone."""

    async def read(self) -> bytes:
        """The next of its output; b"" at the end."""

    def close(self) -> None:
        """The bash ends with it, unless a command runs. Idempotent."""


def request(marker: str, argv: list[str], *, merge_stderr: bool, is_last: bool) -> bytes:
    """What to send for one command. The last of a channel may be followed by its stdin."""
    mode = "last" if is_last else "merged" if merge_stderr else "stdout"
    fields = [marker, mode, str(len(argv)), *argv]
    return b"".join(field.encode("utf-8", "surrogateescape") + b"\0" for field in fields)


class Marked:
    """Feeds an output with what is between the markers, and reads the exit code after them."""

    def __init__(self, marker: str, output: OutputBuffer) -> None:
        self.marker = marker
        self._marker = marker.encode()
        self._output = output
        self._held = b""
        self._note = b""
        self.has_begun = False
        self.code: int | None = None

    def feed(self, chunk: bytes) -> None:
        if self.code is not None:
            return
        self._held += chunk
        before, found, after = self._held.partition(self._marker)
        if not self.has_begun:
            if not found:
                self._held = self._held[-len(self._marker) :]
                return
            self.has_begun, self._held = True, after
            before, found, after = self._held.partition(self._marker)
        code, is_whole, _ = after.partition(b";")
        if is_whole:
            self.code = int(code)
            self._output.feed(before)
            self._held = b""
        elif not found:
            keep = len(self._marker) + _MAX_CODE_BYTES
            self._output.feed(self._held[:-keep])
            self._held = self._held[-keep:]

    def note(self, line: bytes) -> None:
        """For the end of the output."""
        self._note = line

    def finish(self) -> None:
        """No more comes."""
        self._output.feed((self._held if self.has_begun else b"") + self._note)
        self._held = self._note = b""


class CommandRunner(ABC):
    """Runs one command after the other in a sandbox, over a channel that is opened when it is needed."""

    def __init__(self) -> None:
        self._channel: Channel | None = None

    async def _run(
        self,
        script: str,
        args: tuple[str, ...],
        *,
        stdin: bytes,
        env: dict[str, str],
        timeout_s: float,
        output: OutputBuffer,
        merge_stderr: bool,
    ) -> Exit:
        """Run `bash -c script` inside as root in `/`, feeding `output`.

        Returns when the script's shell has ended, though its children may hold the output.
        On timeout and on cancellation every process but PID 1 is dead before it ends. Raises
        `SandboxFailed` if PID 1 is gone.
        """
        marked = Marked(f"<{secrets.token_hex(8)}>", output)
        variables = ["env", *(f"{key}={value}" for key, value in env.items())] if env else []
        argv = [*variables, "bash", "--norc", "-c", script, "bash", *args]
        content = request(marked.marker, argv, merge_stderr=merge_stderr, is_last=bool(stdin)) + stdin
        try:
            while True:
                is_new, channel = self._channel is None, await self._opened()
                timed_out = await self._follow(channel, content, marked, timeout_s)
                if marked.has_begun or is_new or timed_out:
                    break
                self._close_channel()  # it had died before the command came
        except NotRunnable as error:
            output.feed(f"{error}\n".encode())
            return Exit(code=NOT_RUNNABLE, timed_out=False)
        marked.finish()
        if timed_out:
            return Exit(code=KILLED, timed_out=True)
        code = marked.code
        if stdin or code is None:
            self._channel = None
            try:
                code = await self._code_of(channel) if code is None else code
            finally:
                channel.close()
        return Exit(code=code, timed_out=False)

    async def _opened(self) -> Channel:
        if self._channel is None:
            self._channel = await self._open()
        return self._channel

    async def _follow(self, channel: Channel, content: bytes, marked: Marked, timeout_s: float) -> bool:
        """True if it had to be killed for the time; kills it on cancellation too."""
        try:
            async with asyncio.timeout(timeout_s), self._watched(marked):
                # It may end without reading its stdin; its exit code tells.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    await channel.send(content)
                await _read_to_end(channel, marked)
            return False
        except TimeoutError:
            await asyncio.shield(self._kill_until_ended(channel, marked))
            return True
        except asyncio.CancelledError:
            await asyncio.shield(self._kill_until_ended(channel, marked))
            raise

    async def _kill_until_ended(self, channel: Channel, marked: Marked) -> None:
        for _ in range(int(_KILL_PATIENCE_S / _KILL_EVERY_S)):
            await self._clear()
            try:
                async with asyncio.timeout(_KILL_EVERY_S):
                    while chunk := await channel.read():
                        marked.feed(chunk)
                self._close_channel()
                return
            except TimeoutError:
                continue
        self._close_channel()
        await self._end()

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    @abstractmethod
    async def _open(self) -> Channel:
        """Start `CHANNEL_SCRIPT` inside, as root in `/`. Raises `SandboxFailed` if PID 1 is gone,
        `NotRunnable` if nothing can be started inside. Cancelled, it leaves nothing behind."""

    @abstractmethod
    async def _code_of(self, channel: Channel) -> int:
        """The exit code of a channel that a command took along. Raises `SandboxFailed` if PID 1 is gone."""

    @abstractmethod
    async def _clear(self) -> None:
        """Tell PID 1 to end every other process; it may take the order a moment later."""

    @abstractmethod
    async def _end(self) -> None:
        """For when that does not help: the whole sandbox goes."""

    @asynccontextmanager
    async def _watched(self, marked: Marked) -> AsyncIterator[None]:
        """Around each command, for a limit that the backend has to see to itself."""
        yield


async def _read_to_end(channel: Channel, marked: Marked) -> None:
    while marked.code is None and (chunk := await channel.read()):
        marked.feed(chunk)
