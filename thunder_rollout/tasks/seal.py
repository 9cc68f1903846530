"""The sealed record of a test run (see `seal_plugin`), as the grader reads it.

What a test prints or writes can't pass for a verdict: only a record whose HMAC fits the run's own
secret is read.
"""

from __future__ import annotations

import hmac
import json
from pathlib import Path

from thunder_rollout.tasks.report import BadReport

PLUGIN, AT_START = "thunder_seal", "sitecustomize"  # the names under which it is loaded
PLUGIN_SOURCE = Path(__file__).with_name("seal_plugin.py")


def unseal(content: bytes, secret: bytes) -> tuple[bytes, frozenset[str]]:
    """The record, and what of the runner was replaced while it ran. Raises `BadReport`."""
    seal, _, record = content.partition(b"\n")
    expected = hmac.new(secret, record, "sha256").hexdigest().encode()
    if not hmac.compare_digest(seal, expected):
        raise BadReport("the report isn't sealed by the grader")
    return record, frozenset(json.loads(record)["altered"])


def passed_in_record(record: bytes) -> dict[str, bool]:
    """Test to whether it passed; pytest's tests by their node ids."""
    passed: dict[str, bool] = json.loads(record)["passed"]
    return passed


def skipped_in_record(record: bytes) -> frozenset[str]:
    """Of pytest's tests, those that were skipped or failed as expected."""
    return frozenset(json.loads(record)["skipped"])
