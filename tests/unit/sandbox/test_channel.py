"""The channel's framing, and the bash on its other end, without a sandbox around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunder_rollout.sandbox.channel import CHANNEL_SCRIPT, Marked, request
from thunder_rollout.sandbox.output import OutputBuffer

MARKER = "<0123456789abcdef>"


@given(st.binary(max_size=60), st.binary(max_size=60), st.integers(0, 255), st.lists(st.integers(1, 20), max_size=12))
def test_what_is_between_the_markers_comes_out_however_it_is_cut(
    before: bytes, printed: bytes, code: int, cuts: list[int]
) -> None:
    stream = before + MARKER.encode() + printed + MARKER.encode() + b"%d;" % code + b"late"
    output = OutputBuffer(1000)
    marked = Marked(MARKER, output)
    position = 0
    for size in [*cuts, len(stream)]:
        marked.feed(stream[position : position + size])
        position += size
    marked.finish()
    assert (marked.code, output.content()) == (code, printed)


def test_an_end_without_a_code_keeps_what_was_printed() -> None:
    output = OutputBuffer(1000)
    marked = Marked(MARKER, output)
    marked.feed(b"of nobody" + MARKER.encode() + b"printed <0123")
    marked.note(b" (noted)")
    marked.finish()
    assert (marked.has_begun, marked.code, output.content()) == (True, None, b"printed <0123 (noted)")


class Bash:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def run(self, command: str, *, merge_stderr: bool = True, stdin: bytes = b"") -> tuple[int | None, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        output = OutputBuffer(10_000)
        marked = Marked(MARKER, output)
        argv = ["bash", "--norc", "-c", command]
        self.process.stdin.write(request(MARKER, argv, merge_stderr=merge_stderr, is_last=bool(stdin)) + stdin)
        while marked.code is None and (chunk := await self.process.stdout.read(100)):
            marked.feed(chunk)
        marked.finish()
        return marked.code, output.text()


@pytest.fixture
async def bash() -> AsyncIterator[Bash]:
    process = await asyncio.create_subprocess_exec("bash", "--norc", "-c", CHANNEL_SCRIPT, stdin=-1, stdout=-1)
    yield Bash(process)
    assert process.stdin is not None
    process.stdin.close()
    async with asyncio.timeout(10):
        await process.wait()


async def test_commands_follow_each_other(bash: Bash) -> None:
    assert await bash.run("echo on; echo off >&2; exit 3") == (3, "on\noff\n")
    assert await bash.run("echo on; echo off >&2", merge_stderr=False) == (0, "on\n")
    assert await bash.run("cat; echo é") == (0, "é\n")
    assert await bash.run("kill -9 $$") == (137, "")


async def test_what_a_daemon_prints_later_is_nobodys(bash: Bash) -> None:
    assert await bash.run("(while sleep 0.02; do echo late; done) & echo now") == (0, "now\n")
    await asyncio.sleep(0.2)
    assert await bash.run("sleep 0.2") == (0, "")


async def test_the_last_command_has_the_stdin_and_what_it_leaves_is_no_request(bash: Bash) -> None:
    left = request(MARKER, ["touch", "/tmp/never"], merge_stderr=True, is_last=False)
    assert await bash.run("head -c 3", stdin=b"abc" + left) == (0, "abc")
    assert bash.process.stdin is not None and bash.process.stdout is not None
    bash.process.stdin.close()
    assert await bash.process.stdout.read() == b""


async def test_a_command_that_kills_it_ends_the_stream(bash: Bash) -> None:
    assert await bash.run("echo on; kill -9 $PPID") == (None, "on\n")
