"""A sandbox without processes: files in memory and scripted commands, for tests and simulation."""

from __future__ import annotations

import asyncio
import difflib
import posixpath
from collections.abc import Callable, Mapping

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.output import truncate_middle
from thunder_rollout.sandbox.protocol import ExecResult, Rest, SandboxSpec

Script = Mapping[str, ExecResult] | Callable[[str], ExecResult]


class FakeSandbox:
    """`script` answers `exec`: a mapping from the command, or a function of it. A command it does
    not know ends with exit code 127, one whose `took_s` is over the timeout times out (at once).

    `start_s` is how long `start` takes; `start_error` is what it raises. `kill` ends it as if
    under its program. While `trouble` is set, every call but `stop` raises it, as on a machine without file
    descriptors; `stop_failures` is how many calls of `stop` fail from now on. The diff is of text files under
    the workdir since `start`, whatever the base commit.
    """

    def __init__(
        self,
        spec: SandboxSpec,
        script: Script | None = None,
        *,
        start_s: float = 0.0,
        start_error: Exception | None = None,
    ) -> None:
        self.spec = spec
        self.commands: list[str] = []
        self.files: dict[str, bytes] = {}
        self.running = False
        self.resting = Rest.KEEP
        self.trouble: Exception | None = None
        self.stop_failures = 0
        self._first_files: dict[str, bytes] = {}
        self._script: Script = script if script is not None else {}
        self._start_s = start_s
        self._start_error = start_error
        self._stopped = False

    async def start(self) -> None:
        if self._stopped or self.running:
            raise SandboxFailed("sandbox: it was started or stopped before; make a new one")
        await asyncio.sleep(self._start_s)
        if self._start_error is not None:
            raise self._start_error
        self.files = dict(self.spec.files)
        self._first_files = dict(self.files)
        self.running = True

    async def exec(self, command: str, *, timeout_s: float) -> ExecResult:
        self._require_running()
        await asyncio.sleep(0)
        self.commands.append(command)
        result = self._script(command) if callable(self._script) else self._script.get(command)
        if result is None:
            return ExecResult(
                exit_code=127, output=f"bash: {command}: command not found\n", timed_out=False, took_s=0.0
            )
        output = truncate_middle(result.output, self.spec.limits.output_bytes)
        if result.timed_out or result.took_s > timeout_s:
            return ExecResult(exit_code=124, output=output, timed_out=True, took_s=timeout_s)
        return ExecResult(exit_code=result.exit_code, output=output, timed_out=False, took_s=result.took_s)

    async def read_file(self, path: str) -> bytes:
        self._require_running()
        try:
            return self.files[self._absolute(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    async def write_file(self, path: str, content: bytes) -> None:
        self._require_running()
        self.files[self._absolute(path)] = content

    async def diff(self, base_commit: str) -> bytes:
        self._require_running()
        root = self.spec.workdir.rstrip("/") + "/"
        paths = sorted(path for path in {*self.files, *self._first_files} if path.startswith(root))
        return "".join(self._file_diff(path, path.removeprefix(root)) for path in paths).encode()

    def _file_diff(self, path: str, name: str) -> str:
        old, new = self._first_files.get(path), self.files.get(path)
        if old == new:
            return ""
        lines = difflib.unified_diff(
            _lines(old), _lines(new), f"a/{name}" if old is not None else "/dev/null",
            f"b/{name}" if new is not None else "/dev/null",
        )  # fmt: skip
        return f"diff --git a/{name} b/{name}\n" + "".join(lines)

    async def is_alive(self) -> bool:
        if self.trouble is not None:
            raise self.trouble
        return self.running

    async def clear(self) -> None:
        self._require_running()

    async def rest(self, how: Rest) -> Rest:
        deepest = Rest.KEEP if how is Rest.KEEP else max(how, self.resting)
        self._require_running()
        self.resting = deepest
        return deepest

    async def stop(self) -> None:
        self._stopped = True
        if self.stop_failures:
            self.stop_failures -= 1
            raise SandboxFailed("sandbox: it was not removed; stop it again")
        self.running = False

    def kill(self) -> None:
        self.running = False

    def _require_running(self) -> None:
        if self.trouble is not None:
            raise self.trouble
        if not self.running:
            raise SandboxFailed("sandbox: not running (never started, stopped, or killed)")
        self.resting = Rest.KEEP

    def _absolute(self, path: str) -> str:
        return posixpath.join(self.spec.workdir, path)


def _lines(content: bytes | None) -> list[str]:
    return (content or b"").decode("utf-8", "replace").splitlines(keepends=True)
