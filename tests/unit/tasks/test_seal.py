from __future__ import annotations

import hmac
import json

import pytest

from thunder_rollout.tasks.report import BadReport
from thunder_rollout.tasks.seal import passed_in_record, unseal

RECORD = json.dumps({"passed": {"t.py::a": True, "t.py::b": False}, "altered": ["_pytest.python.x"]}).encode()


def sealed(record: bytes, secret: bytes) -> bytes:
    return hmac.new(secret, record, "sha256").hexdigest().encode() + b"\n" + record


def test_a_sealed_record_is_read() -> None:
    record, altered = unseal(sealed(RECORD, b"secret"), b"secret")
    assert passed_in_record(record) == {"t.py::a": True, "t.py::b": False}
    assert altered == {"_pytest.python.x"}


@pytest.mark.parametrize("content", [b"", b"\n", RECORD, b"0" * 64 + b"\n" + RECORD, sealed(RECORD, b"guess")])
def test_a_record_without_the_seal_is_none(content: bytes) -> None:
    with pytest.raises(BadReport, match="isn't sealed"):
        unseal(content, b"secret")


def test_a_changed_record_breaks_the_seal() -> None:
    content = sealed(RECORD, b"secret").replace(b"false", b"true ")
    with pytest.raises(BadReport):
        unseal(content, b"secret")
