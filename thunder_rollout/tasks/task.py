"""The one `Task` type: what an agent is asked, where it works and how it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One SWE-style task; the first fields are SWE-bench's columns.

    `image` is where the repository lies at `workdir`, at `base_commit`. Tasks that carry their
    repository with them (toy tasks) put it in place through `files` and `setup`, see
    `SandboxSpec`. `test_files` maps paths (relative to workdir) to the hidden tests' contents;
    `test_patch` is their SWE-bench form; grading applies whichever is there. `test_command` runs
    the tests given as arguments. Columns this project doesn't know are kept in `extra`.
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
    kind: str = "swe"
    extra: dict[str, Any] = field(default_factory=dict)
