from __future__ import annotations

import asyncio

import pytest

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.fake import FakeSandbox
from thunder_rollout.sandbox.protocol import ExecResult, Sandbox, SandboxLimits, SandboxSpec

SPEC = SandboxSpec(image="", files={"/testbed/a.py": b"x = 1\n", "/etc/x": b""}, limits=SandboxLimits(output_bytes=100))


def result(output: str = "", *, exit_code: int = 0, timed_out: bool = False, took_s: float = 0.1) -> ExecResult:
    return ExecResult(exit_code=exit_code, output=output, timed_out=timed_out, took_s=took_s)


async def test_it_answers_from_its_script() -> None:
    box: Sandbox = FakeSandbox(SPEC, {"ls": result("a.py\n"), "slow": result(took_s=9), "long": result("x" * 999)})
    await box.start()
    assert (await box.exec("ls", timeout_s=1)).output == "a.py\n"
    assert (await box.exec("what", timeout_s=1)).exit_code == 127
    slow = await box.exec("slow", timeout_s=1)
    assert (slow.exit_code, slow.timed_out, slow.took_s) == (124, True, 1)
    assert "bytes cut" in (await box.exec("long", timeout_s=1)).output


async def test_it_answers_from_a_function_and_remembers() -> None:
    box = FakeSandbox(SPEC, lambda command: result(command.upper()))
    await box.start()
    assert (await box.exec("hi", timeout_s=1)).output == "HI"
    assert box.commands == ["hi"]


async def test_files_and_diff() -> None:
    box = FakeSandbox(SPEC)
    await box.start()
    assert await box.diff("HEAD") == b""
    await box.write_file("a.py", b"x = 2\n")
    await box.write_file("/testbed/new.py", b"y\n")
    await box.write_file("/etc/x", b"outside")
    assert await box.read_file("/testbed/a.py") == b"x = 2\n"
    patch = (await box.diff("HEAD")).decode()
    assert "-x = 1\n+x = 2\n" in patch
    assert "--- /dev/null" in patch
    assert "outside" not in patch
    with pytest.raises(FileNotFoundError):
        await box.read_file("/missing")


async def test_a_dead_stopped_or_failed_one_is_a_typed_error() -> None:
    box = FakeSandbox(SPEC)
    with pytest.raises(SandboxFailed):
        await box.exec("ls", timeout_s=1)
    await box.start()
    box.kill()
    with pytest.raises(SandboxFailed):
        await box.read_file("/testbed/a.py")
    await asyncio.gather(box.stop(), box.stop())
    with pytest.raises(SandboxFailed, match="make a new one"):
        await box.start()
    with pytest.raises(SandboxFailed, match="no luck"):
        await FakeSandbox(SPEC, start_error=SandboxFailed("no luck")).start()
