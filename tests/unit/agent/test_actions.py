import pytest

from thunder_rollout.agent.actions import Action, Malformed, format_observation, parse_action
from thunder_rollout.sandbox.protocol import ExecResult


def block(command: str) -> str:
    return f"Let me look.\n```bash\n{command}\n```\n"


def test_one_block_is_an_action():
    assert parse_action(block("ls -la")) == Action("ls -la")


def test_a_block_may_span_lines_and_hold_backticks():
    assert parse_action(block("cat <<'E'\n`x`\nE")) == Action("cat <<'E'\n`x`\nE")


def test_submit_alone_submits():
    assert parse_action(block(" submit ")) == Action("submit", submit=True)


def test_submit_among_other_commands_is_a_command():
    assert parse_action(block("echo submit")) == Action("echo submit")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("I would list the files.", "no bash block"),
        (block("ls") + block("pwd"), "2 bash blocks"),
        ("```bash\nls", "no bash block"),
        ("```bash\n```", "empty"),
        ("```python\nprint(1)\n```", "no bash block"),
    ],
)
def test_anything_else_says_how_to_act(text, said):
    answer = parse_action(text)
    assert isinstance(answer, Malformed)
    assert said in answer.observation
    assert "bash" in answer.observation


def test_an_observation_shows_exit_code_and_output():
    result = ExecResult(exit_code=2, output="no such file\n", timed_out=False, took_s=0.1)
    assert format_observation(result) == "[exit 2]\nno such file"


def test_an_observation_of_silence_is_the_exit_code():
    assert format_observation(ExecResult(exit_code=0, output="", timed_out=False, took_s=0.1)) == "[exit 0]"


def test_an_observation_says_that_it_timed_out():
    result = ExecResult(exit_code=124, output="half", timed_out=True, took_s=30.2)
    assert format_observation(result) == "[timed out after 30 s and was killed]\nhalf"
