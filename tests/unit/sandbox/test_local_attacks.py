"""Attempts to cheat and to break things, in local sandboxes and on their graders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.support.attacks import *  # noqa: F403
from tests.support.grading_attacks import *  # noqa: F403
from tests.support.sandbox_contract import MakeSandbox
from thunder_rollout.sandbox.local import LocalSandbox, local_unavailable, sweep_local

pytestmark = pytest.mark.slow

RUN = f"test-attacks-{os.getpid()}"


@pytest.fixture
def make() -> Iterator[MakeSandbox]:
    if refusal := local_unavailable():
        pytest.fail(refusal) if os.environ.get("CI") == "true" else pytest.skip(refusal)
    yield lambda spec: LocalSandbox(replace(spec, labels={"run": RUN} | spec.labels))
    sweep_local(RUN, lambda session: True)
