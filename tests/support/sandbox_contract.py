"""What every real sandbox does: `from tests.support.sandbox_contract import *` in a test module
that has a fixture `make` (`MakeSandbox`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from thunder_rollout.errors import SandboxFailed, UndiffableChanges
from thunder_rollout.sandbox import shell
from thunder_rollout.sandbox.protocol import HostedSandbox, SandboxLimits, SandboxSpec

MakeSandbox = Callable[[SandboxSpec], HostedSandbox]

LIMITS = SandboxLimits(memory_bytes=256 * 2**20, pids=64, disk_bytes=32 * 2**20, output_bytes=2000)
SPEC = SandboxSpec(
    image="thunder-toy:1",
    files={"/testbed/a.py": b"x = 1\n", "/testbed/sub/b.txt": b"b\n", "/testbed/run.sh": b"#!/bin/sh\necho ran\n"},
    setup="cd /testbed && git init -q && git add -A && git commit -qm base",
    limits=LIMITS,
)


@asynccontextmanager
async def started(make: MakeSandbox, spec: SandboxSpec = SPEC, **changes: Any) -> AsyncIterator[HostedSandbox]:
    sandbox = make(replace(spec, **changes))
    try:
        await sandbox.start()
        yield sandbox
    finally:
        await sandbox.stop()


async def test_exit_codes_output_and_workdir(make: MakeSandbox) -> None:
    async with started(make) as box:
        result = await box.exec("pwd; echo err >&2; exit 3", timeout_s=10)
        assert (result.exit_code, result.output, result.timed_out) == (3, "/testbed\nerr\n", False)
        assert (await box.exec("true", timeout_s=10)).exit_code == 0
        assert (await box.exec("no_such_program", timeout_s=10)).exit_code == 127
        assert (await box.exec("if then", timeout_s=10)).exit_code == 2
        assert (await box.exec("./run.sh", timeout_s=10)).output == "ran\n"


async def test_each_command_is_a_new_shell_on_the_same_files(make: MakeSandbox) -> None:
    async with started(make) as box:
        await box.exec("cd /tmp; X=1; echo kept > /tmp/f", timeout_s=10)
        assert (await box.exec("pwd; echo [$X]; cat /tmp/f", timeout_s=10)).output == "/testbed\n[]\nkept\n"


async def test_a_command_may_kill_all_others_and_print_after_its_end(make: MakeSandbox) -> None:
    async with started(make) as box:
        await box.exec("(sleep 0.2; echo late; kill -9 -1) & echo now", timeout_s=10)
        await asyncio.sleep(0.5)
        assert (await box.exec("echo on; sleep 0.1", timeout_s=10)).output == "on\n"


async def test_a_command_that_halts_its_way_in_costs_itself_the_time_limit(make: MakeSandbox) -> None:
    async with started(make) as box:
        for halt in ("kill -STOP $PPID", "(sleep 0.1; kill -STOP $PPID) & echo now"):
            await box.exec(halt, timeout_s=1)
            await asyncio.sleep(0.3)
            await box.exec("true", timeout_s=1)
            assert (await box.exec("echo on", timeout_s=10)).output == "on\n"


async def test_environment_reaches_the_command_only(make: MakeSandbox) -> None:
    async with started(make, env={"GREETING": "a 'b' \"c\"", "LD_PRELOAD": "/no/such.so"}) as box:
        assert (await box.exec("unset LD_PRELOAD; echo $GREETING", timeout_s=10)).output.endswith("a 'b' \"c\"\n")


async def test_more_cpus_than_the_node_has_are_as_many_as_it_has(make: MakeSandbox) -> None:
    async with started(make, limits=replace(LIMITS, cpus=1000.0)) as box:
        assert (await box.exec("echo $OMP_NUM_THREADS", timeout_s=10)).output == f"{os.cpu_count()}\n"


async def test_pytest_and_git_work(make: MakeSandbox) -> None:
    async with started(make) as box:
        await box.write_file("/testbed/test_it.py", b"def test_it(): assert 1 + 1 == 2\n")
        result = await box.exec("python -m pytest -q -p no:cacheprovider && git status --short", timeout_s=60)
        assert "1 passed" in result.output
        assert "?? test_it.py" in result.output


async def test_output_is_cut_in_the_middle(make: MakeSandbox) -> None:
    async with started(make) as box:
        result = await box.exec("echo first; head -c 100000 /dev/zero | tr '\\0' x; echo; echo last", timeout_s=10)
        assert result.output.startswith("first\n")
        assert result.output.endswith("last\n")
        assert "bytes cut" in result.output
        assert len(result.output) < LIMITS.output_bytes + 100


async def test_undecodable_output_is_replaced(make: MakeSandbox) -> None:
    async with started(make) as box:
        result = await box.exec("printf 'a\\xff\\xfe\\0b'", timeout_s=10)
        assert result.output == "a\ufffd\ufffd\0b"


async def test_unrunnable_commands_are_observations(make: MakeSandbox) -> None:
    async with started(make) as box:
        for command in ("echo a\0b", "echo " + "x" * 200_000):
            assert (await box.exec(command, timeout_s=10)).exit_code == 126
        assert (await box.exec("echo \udce9", timeout_s=10)).exit_code == 0
        await box.exec("rm -rf /testbed", timeout_s=10)
        assert "working directory is gone" in (await box.exec("pwd", timeout_s=10)).output


async def test_files_are_read_and_written(make: MakeSandbox) -> None:
    async with started(make) as box:
        content = bytes(range(256)) * 5000
        await box.write_file("/testbed/new dir/it's.bin", content)
        assert await box.read_file("/testbed/new dir/it's.bin") == content
        await box.write_file("/testbed/empty", b"")
        assert await box.read_file("/testbed/empty") == b""
        for path in ("/testbed/missing", "/testbed", "/testbed/\0"):
            with pytest.raises(FileNotFoundError):
                await box.read_file(path)


async def test_diff_is_empty_without_changes_and_whole_with_them(make: MakeSandbox) -> None:
    async with started(make) as box:
        base = (await box.exec("git rev-parse HEAD", timeout_s=10)).output.strip()
        assert await box.diff(base) == b""
        await box.exec(
            "echo 'x = 2' > a.py; git add a.py; git commit -qm mine; mkdir d; printf '\\0\\1\\xff' > d/new.bin;"
            "git mv sub/b.txt sub/c.txt; chmod -x run.sh; ln -s a.py link",
            timeout_s=10,
        )
        status = (await box.exec("git status --short", timeout_s=10)).output
        patch = await box.diff(base)
        assert (await box.exec("git status --short", timeout_s=10)).output == status, "the agent's index is untouched"
        await box.exec(f"git reset -q --hard {base}; git clean -qfd", timeout_s=10)
        await box.write_file("/tmp/patch", patch)
        applied = await box.exec("git apply /tmp/patch && ls -lR && cat a.py && od -c d/new.bin", timeout_s=10)
        for expected in ("x = 2", "377", "c.txt", "link -> a.py", "-rw-r--r--"):
            assert expected in applied.output
        assert "b.txt" not in applied.output


async def test_diff_is_not_fooled_by_the_repository(make: MakeSandbox) -> None:
    async with started(make) as box:
        tricks = (
            "git config diff.external 'echo fooled'",
            "git config core.hooksPath /testbed",
            "git config core.fileMode false",
            "git config filter.f.clean 'echo fooled'",
            "git config diff.f.textconv 'echo fooled'",
            "echo '* filter=f diff=f' > .gitattributes",
            "echo a.py > .git/info/exclude",
            "git update-index --assume-unchanged a.py",
            "echo 'x = 2' > a.py",
            "touch .git/index.lock",
        )
        assert (await box.exec(" && ".join(tricks), timeout_s=10)).exit_code == 0
        patch = await box.diff("HEAD")
        assert b"+x = 2" in patch
        assert b"fooled" not in patch


async def test_repositories_within_and_a_full_scratch_folder_are_not_in_the_diffs_way(make: MakeSandbox) -> None:
    async with started(make, limits=replace(LIMITS, memory_bytes=1024 * 2**20)) as box:
        mess = (
            "mkdir -p t/u && git init -q t && echo 1 > t/u/v && git init -q w && cd w && echo 2 > x && git add x &&"
            "git commit -qm x; head -c 300000000 /dev/zero > /run/thunder/full; echo 'x = 2' > /testbed/a.py;"
            "echo 3 > /testbed/z"
        )
        await box.exec(mess, timeout_s=30)
        patch = await box.diff("HEAD")
        assert b"+x = 2" in patch and b"b/z" in patch
        await box.write_file("/tmp/patch", patch)
        applied = await box.exec("rm -rf t w z; git checkout -q . && git apply /tmp/patch && cat a.py z", timeout_s=10)
        assert applied.output == "x = 2\n3\n"


async def test_what_cant_be_a_patch_is_the_agents_failure(make: MakeSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "MAX_FILE_BYTES", 10_000)
    async with started(make) as box:
        await box.exec("head -c 20000 /dev/urandom > new", timeout_s=10)
        with pytest.raises(UndiffableChanges, match="over 10000 bytes"):
            await box.diff("HEAD")
        await box.exec("rm new; rm -rf .git/objects; mkdir .git/objects", timeout_s=10)
        assert await box.diff("HEAD") == b""
    monkeypatch.setattr(shell, "INTERNAL_TIMEOUT_S", 1.0)
    async with started(make) as box:
        monkeypatch.setattr(shell, "DIFF_SCRIPT", "sleep 100")
        with pytest.raises(UndiffableChanges, match="exit code 137"):
            await box.diff("HEAD")
        await box.stop()
        with pytest.raises(SandboxFailed):
            await box.diff("HEAD")


async def test_a_destroyed_repository_gives_no_patch_and_a_missing_one_an_error(make: MakeSandbox) -> None:
    async with started(make) as box:
        with pytest.raises(SandboxFailed):
            await box.diff("0123456789012345678901234567890123456789")
        await box.exec("rm -rf .git", timeout_s=10)
        assert await box.diff("HEAD") == b""
    async with started(make, setup="") as box:
        with pytest.raises(SandboxFailed, match="not a git repository"):
            await box.diff("HEAD")


async def test_a_failing_setup_or_missing_workdir_is_a_typed_error(make: MakeSandbox) -> None:
    for changes, text in (
        ({"setup": "echo because; exit 7"}, "exit code 7"),
        ({"setup": "sleep 100", "setup_timeout_s": 0.5}, "took over"),
        ({"workdir": "/missing"}, "/missing"),
        ({"files": {"relative": b""}}, "absolute"),
    ):
        sandbox = make(replace(SPEC, **changes))
        with pytest.raises(SandboxFailed, match=text):
            await sandbox.start()
        with pytest.raises(SandboxFailed, match="not running"):
            await sandbox.exec("true", timeout_s=1)


async def test_stop_is_idempotent_and_final(make: MakeSandbox) -> None:
    async with started(make) as box:
        assert await box.is_alive()
        await asyncio.gather(box.stop(), box.stop())
        await box.stop()
        assert not await box.is_alive()
        with pytest.raises(SandboxFailed):
            await box.exec("true", timeout_s=5)
    never_started = make(SPEC)
    assert not await never_started.is_alive()
    await never_started.stop()
    with pytest.raises(SandboxFailed):
        await never_started.start()


async def test_a_stop_that_came_to_nothing_is_a_typed_error_and_may_be_tried_again(
    make: MakeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(make) as box:
        with monkeypatch.context() as patched:
            patched.setattr("thunder_rollout.sandbox.shell.DESTROY_TIMEOUT_S", 0.0)
            with pytest.raises(SandboxFailed, match="stop it again"):
                await box.stop()
        with pytest.raises(SandboxFailed):
            await box.exec("true", timeout_s=5)
        await asyncio.gather(box.stop(), box.stop())


async def test_stop_during_a_command_ends_it(make: MakeSandbox) -> None:
    async with started(make) as box:
        running = asyncio.create_task(box.exec("sleep 1000", timeout_s=100))
        await asyncio.sleep(0.3)
        await box.stop()
        async with asyncio.timeout(10):
            with pytest.raises(SandboxFailed):
                await running


async def test_it_ends_by_itself_after_its_time_to_live(make: MakeSandbox) -> None:
    async with started(make, setup="", limits=replace(LIMITS, ttl_s=1.0)) as box:
        async with asyncio.timeout(15):
            with pytest.raises(SandboxFailed):
                await box.exec("sleep 1000", timeout_s=1000)
            assert not await box.is_alive()


async def test_cancelling_a_command_kills_it(make: MakeSandbox) -> None:
    async with started(make) as box:
        for delay_s in (0.0, 0.005, 0.02, 0.2):
            running = asyncio.create_task(box.exec("(setsid sleep 1000 &); sleep 1000", timeout_s=100))
            await asyncio.sleep(delay_s)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert await count_processes(box, "sleep") == 0


async def test_cancelling_a_start_leaves_nothing(make: MakeSandbox) -> None:
    for delay_s in (0.0, 0.002, 0.01, 0.03, 0.06, 0.1, 0.2):
        sandbox = make(replace(SPEC, labels={"run": "cancelled"}))
        starting = asyncio.create_task(sandbox.start())
        await asyncio.sleep(delay_s)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        await sandbox.stop()


async def count_processes(box: HostedSandbox, name: str) -> int:
    """How many processes inside have this name; zombies, which PID 1 is about to reap, don't count."""
    script = (
        f"for s in /proc/[0-9]*/status; do grep -sqx 'Name:\\s*{name}' $s && ! grep -sq '^State:.Z' $s && echo; done"
    )
    return (await box.exec(script, timeout_s=10)).output.count("\n")
