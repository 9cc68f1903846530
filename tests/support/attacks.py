"""Attempts to cheat, to break out and to break things, each with the ending it must have.

`from tests.support.attacks import *` in a test module that has a fixture `make` (see
`sandbox_contract`). After each attempt a neighbouring sandbox still answers at once. What is tried
on the grader through a patch is in `grading_attacks`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.support.sandbox_contract import LIMITS, SPEC, MakeSandbox, count_processes, started
from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.protocol import Sandbox
from thunder_rollout.tasks.environment import sandbox_spec
from thunder_rollout.tasks.toy import generate

HIDING_FIX = """
cd /testbed && git init -q -b main && git add -A && git commit -qm base && git tag v1
base=$(git rev-parse HEAD)
commit() { echo "$1" > a.py; git commit -qam "$1"; }
git init -q --bare /mirror.git && git remote add origin /mirror.git
commit FIX-on-main && git tag later && git push -q origin main
git reset -q --hard $base && git checkout -q -b other && commit FIX-on-branch
git checkout -q main && echo FIX-in-stash > a.py && git stash -q
git reset -q --hard $base && commit FIX-unreachable && git gc -q && git reset -q --hard $base
echo FIX-blob | git hash-object -w --stdin && git notes add -m FIX-note && echo FIX-staged > b && git add b && rm b
git config user.signature FIX-config
"""


@pytest.fixture(autouse=True)
async def neighbour(make: MakeSandbox) -> AsyncIterator[Sandbox]:
    """Unharmed by whatever the test does beside it."""
    async with started(make, setup="mkdir -p /testbed && echo mine > /testbed/mine") as box:
        yield box
        began_s = time.monotonic()
        seen = (await box.exec("cat mine; df --output=pcent /testbed | grep -c 100%", timeout_s=10)).output
        assert seen == "mine\n0\n"
        assert time.monotonic() - began_s < 5


async def test_the_fix_is_not_in_the_repository(make: MakeSandbox) -> None:
    sources = (
        "git log --all -p", "git log -g -p", "git stash list", "git remote -v", "git branch -a", "git tag",
        "git diff --cached", "git cat-file --batch-all-objects --batch --buffer", "git fsck --full --unreachable",
        "cat .git/config", "find .git -type f -exec cat {} +",
    )  # fmt: skip
    seek = f"({'; '.join(sources)}) 2>&1 | grep -acE 'FIX|mirror|later'"
    async with started(make, setup=HIDING_FIX) as box:
        assert int((await box.exec(seek, timeout_s=20)).output) > 10
    async with started(make, setup=HIDING_FIX, base_commit="v1") as box:
        assert (await box.exec(seek, timeout_s=20)).output == "0\n"


async def test_a_reduced_repository_is_one_to_work_in(make: MakeSandbox) -> None:
    async with started(make, setup=HIDING_FIX, base_commit="v1") as box:
        assert (await box.exec("git status --short; git fsck && git describe --tags", timeout_s=10)).output == "v1\n"
        assert await box.diff("HEAD") == b""
        work = (
            "git checkout -qb work && echo 'x = 2' > a.py && git commit -qam mine && git gc -q && git log --format=%s"
        )
        assert (await box.exec(work, timeout_s=20)).output == "mine\nbase\n"
        assert b"+x = 2" in await box.diff("HEAD")


async def test_changes_that_an_image_came_with_are_not_the_agents(make: MakeSandbox) -> None:
    image = (
        "export GIT_AUTHOR_DATE='1700000000 +0000' GIT_COMMITTER_DATE='1700000000 +0000';"
        "cd /testbed && git init -q && git add -A && git commit -qm base && git tag v1 && echo 'x = 3' > a.py &&"
        "git commit -qam image && echo dirty > sub/b.txt && echo 1 > untracked && rm run.sh"
    )
    async with (
        started(make, setup=image, base_commit="v1") as box,
        started(make, setup=image, base_commit="v1") as twin,
    ):
        head = (await box.exec("git status --short; git rev-parse HEAD", timeout_s=10)).output
        assert (await twin.exec("git rev-parse HEAD", timeout_s=10)).output == head
        assert await box.diff("HEAD") == b""
        await box.exec("echo 'x = 4' > a.py; rm untracked", timeout_s=10)
        await twin.write_file("/tmp/patch", await box.diff("HEAD"))
        applied = await twin.exec("git apply /tmp/patch && cat a.py sub/b.txt; ls", timeout_s=10)
        assert applied.output == "x = 4\ndirty\na.py\nsub\n"


async def test_a_base_commit_that_is_not_there_is_no_start(make: MakeSandbox) -> None:
    box = make(replace(SPEC, base_commit="0123456789012345678901234567890123456789"))
    with pytest.raises(SandboxFailed, match="reducing the repository to 0123"):
        await box.start()


async def test_hidden_tests_and_the_reference_patch_are_unseen(make: MakeSandbox) -> None:
    task = generate(seed=0, count=1, difficulty="easy")[0]
    async with started(make, sandbox_spec(task, limits=LIMITS)) as box:
        added = [line[1:] for line in task.patch.splitlines() if line.startswith("+") and not line.startswith("+++")]
        hidden = [test.rpartition("::")[2] for test in task.fail_to_pass]
        for text in [*added, *hidden]:
            await box.write_file("/tmp/wanted", text.strip().encode())
            seek = "grep -rsFl -f /tmp/wanted / --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr --exclude=wanted"
            assert (await box.exec(f"{seek} --exclude-dir=lib --exclude-dir=dev", timeout_s=30)).output == "", text
        generator = "python3 -c 'from thunder_rollout.tasks.toy import generate; print(generate(0, 1)[0].patch)'"
        assert "No module named" in (await box.exec(generator, timeout_s=30)).output


async def test_host_and_neighbour_are_out_of_reach(make: MakeSandbox, neighbour: Sandbox) -> None:
    serving = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = serving.sockets[0].getsockname()[1]
    await neighbour.exec("python3 -m http.server 8000 >/dev/null 2>&1 & sleep 1", timeout_s=10)
    try:
        async with started(make) as box:
            for number in (port, 8000):
                reach = f"python3 -c \"import socket; socket.create_connection(('127.0.0.1', {number}), 3)\""
                assert "refused" in (await box.exec(reach, timeout_s=10)).output
            assert (await box.exec("find / -xdev -name '*.sock' 2>/dev/null", timeout_s=30)).output == ""
            assert await count_processes(box, "python3") == 0
            for attempt in (
                "mount -t proc proc /mnt",
                "mknod /tmp/disk b 8 0",
                "nsenter -t 1 -m true",
                "chroot /proc/1/root true && unshare -n true",
                "echo 1 > /proc/sys/kernel/panic",
                "echo c > /proc/sysrq-trigger",
                "date -s 2001-01-01",
            ):
                assert (await box.exec(attempt, timeout_s=10)).exit_code != 0, attempt
    finally:
        serving.close()
        await serving.wait_closed()


async def test_gigabytes_of_output_end_at_the_timeout_or_before(make: MakeSandbox) -> None:
    async with started(make) as box:
        result = await box.exec("head -c 3000000000 /dev/zero", timeout_s=1)
        assert "bytes cut" in result.output
        assert result.exit_code in (0, 124)
        assert (await box.exec("echo on", timeout_s=10)).output == "on\n"


async def test_a_command_that_ignores_signals_is_killed_with_its_children(make: MakeSandbox) -> None:
    async with started(make) as box:
        command = "trap '' TERM INT HUP; (setsid sleep 1000 &); echo here; sleep 1000"
        began_s = time.monotonic()
        result = await box.exec(command, timeout_s=1)
        assert (result.exit_code, result.output, result.timed_out) == (124, "here\n", True)
        assert time.monotonic() - began_s < 5
        assert await count_processes(box, "sleep") == 0


async def test_a_daemon_outlives_its_command_and_does_not_hold_it(make: MakeSandbox) -> None:
    async with started(make) as box:
        began_s = time.monotonic()
        result = await box.exec("sleep 1000 & echo done", timeout_s=20)
        assert (result.exit_code, result.output) == (0, "done\n")
        assert time.monotonic() - began_s < 10
        assert await count_processes(box, "sleep") == 1


async def test_commands_that_kill_their_shell_are_observations(make: MakeSandbox) -> None:
    async with started(make) as box:
        assert (await box.exec("kill -9 $$", timeout_s=10)).exit_code == 137
        await box.exec("kill -9 $PPID; kill -9 -1; kill -9 1; kill -9 $$", timeout_s=10)
        assert (await box.exec("echo alive", timeout_s=10)).output == "alive\n"


async def test_a_fork_bomb_is_bounded_and_leaves_a_working_sandbox(make: MakeSandbox) -> None:
    async with started(make) as box:
        result = await box.exec("bomb() { bomb | bomb & wait; }; bomb; sleep 1000", timeout_s=1)
        assert result.timed_out
        await asyncio.sleep(1)
        assert (await box.exec("echo on", timeout_s=10)).output == "on\n"


async def test_a_memory_hog_is_killed(make: MakeSandbox) -> None:
    async with started(make) as box:
        result = await box.exec("python3 -c 'x = b\"a\" * 10**9'", timeout_s=30)
        assert result.exit_code != 0
        assert (await box.exec("echo on", timeout_s=10)).output == "on\n"


async def test_a_full_disk_is_an_observation_and_the_diff_still_works(make: MakeSandbox) -> None:
    async with started(make) as box:
        await box.exec("echo 'x = 2' > a.py", timeout_s=10)
        result = await box.exec("head -c 100000000 /dev/zero > /testbed/big.bin", timeout_s=30)
        assert result.exit_code != 0
        await box.exec("mv big.bin /var/tmp/big.bin", timeout_s=30)
        assert b"+x = 2" in await box.diff("HEAD")


async def test_a_disk_full_of_small_files_is_an_observation(make: MakeSandbox) -> None:
    async with started(make) as box:
        fill = "for i in {1..400}; do head -c 2000000 /dev/zero > f$i || exit 1; sleep 0.05; done"
        result = await box.exec(fill, timeout_s=60)
        assert result.exit_code != 0 and not result.timed_out
        assert "full" in result.output or "No space" in result.output
        assert (await box.exec("ls | wc -l; rm f*", timeout_s=30)).exit_code == 0
        assert (await box.exec("echo on", timeout_s=10)).output == "on\n"


async def test_a_daemon_left_behind_does_not_fill_the_disk_while_no_command_runs(make: MakeSandbox) -> None:
    async with started(make) as box:
        fill = "for ((i = 0; ; i++)); do head -c 2000000 /dev/zero > f$i; sleep 0.1; done"
        await box.exec(f"({fill}) >/dev/null 2>&1 &", timeout_s=10)
        await asyncio.sleep(7)
        before = (await box.exec("du -s .", timeout_s=10)).output
        await asyncio.sleep(0.5)
        assert (await box.exec("du -s .", timeout_s=10)).output == before
        assert (await box.exec("rm f*; echo on", timeout_s=10)).output == "on\n"


async def test_what_is_written_to_the_stdout_of_pid_1_goes_nowhere(make: MakeSandbox) -> None:
    async with started(make) as box:
        assert (await box.exec("readlink /proc/1/fd/1 /proc/1/fd/2", timeout_s=10)).output == "/dev/null\n" * 2


async def test_there_is_no_network_but_loopback(make: MakeSandbox) -> None:
    async with started(make) as box:
        reach = "python3 -c \"import socket; socket.create_connection(('192.0.2.1', 53), 3)\""
        assert "unreachable" in (await box.exec(reach, timeout_s=10)).output
        listen = "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); socket.create_connection(s.getsockname())"
        assert (await box.exec(f'python3 -c "import socket; {listen}"', timeout_s=10)).exit_code == 0
