"""The agent's action format: one fenced bash block a turn, `submit` alone in it to finish."""

from __future__ import annotations

import re
from dataclasses import dataclass

from thunder_rollout.sandbox.protocol import ExecResult

SUBMIT = "submit"
TIMEOUT_NOTE = "[timed out after {seconds:.0f} s and was killed]"

_BLOCK = re.compile(r"^```(?:bash|sh)[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Action:
    """`command` runs in the sandbox; `submit` ends the episode instead."""

    command: str
    submit: bool = False


@dataclass(frozen=True, slots=True)
class Malformed:
    """Not an action; `observation` tells the agent how to act."""

    observation: str


def parse_action(text: str) -> Action | Malformed:
    """Read the one action out of a turn's text (special tokens already removed)."""
    blocks = _BLOCK.findall(text)
    if len(blocks) != 1:
        found = "no bash block" if not blocks else f"{len(blocks)} bash blocks"
        return Malformed(
            f"[format error: {found}] Reply with exactly one block:\n"
            f"```bash\nyour command\n```\nTo finish, the command is `{SUBMIT}`."
        )
    command = blocks[0].strip()
    if not command:
        return Malformed("[format error: the bash block is empty] Put one command in it.")
    return Action(command, submit=command == SUBMIT)


def format_observation(result: ExecResult) -> str:
    """What the agent reads after its command: the exit code, then the output."""
    head = TIMEOUT_NOTE.format(seconds=result.took_s) if result.timed_out else f"[exit {result.exit_code}]"
    output = result.output.rstrip("\n")
    return f"{head}\n{output}" if output else head
