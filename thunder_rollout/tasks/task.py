"""The one `Task` type: what an agent is asked, where it works and how it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One SWE-style task; the first fields are SWE-bench's columns.

    `image` is where the repository lies at `workdir`, at `base_commit`. Tasks that carry their
    repository with them (toy tasks) put it in place through `files` and `setup`, see
    `SandboxSpec`, and are `self_contained` if they need no more of an image than Python with pytest,
    and git: then they run in local sandboxes too. `test_files` maps paths (relative to workdir) to
    the hidden tests' contents; `test_patch` is their SWE-bench form; grading applies whichever is
    there. `test_command` runs
    the tests given as arguments and `suite` says how its names and its report read (see `suites`).
    `env` is set for every command in its sandboxes. `hidden_paths` (absolute, or relative to workdir)
    are in the image for the grader alone: the agent's sandbox loses them before the agent sees it, and
    its repository the past that holds them (their `base_commit` must be HEAD).
    Columns this project doesn't know are kept in `extra`.
    """

    instance_id: str
    repo: str
    base_commit: str
    problem_statement: str
    image: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...] = ()
    patch: str = ""
    test_patch: str = ""
    version: str = ""
    workdir: str = "/testbed"
    files: dict[str, bytes] = field(default_factory=dict)
    setup: str = ""
    test_files: dict[str, str] = field(default_factory=dict)
    test_command: str = "python -m pytest -rA -q -p no:cacheprovider"
    suite: str = "pytest"
    env: dict[str, str] = field(default_factory=dict)
    hidden_paths: tuple[str, ...] = ()
    self_contained: bool = False
    kind: str = "swe"
    extra: dict[str, Any] = field(default_factory=dict)
