from __future__ import annotations

import pytest

from thunder_rollout.tasks.report import BadReport, passed_by_test


def report(*cases: str) -> bytes:
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>".encode()


def case(name: str, inside: str = "", *, dotted: str = "tests.test_a", file: str = "tests/test_a.py") -> str:
    return f'<testcase classname="{dotted}" name="{name}" file="{file}">{inside}</testcase>'


def test_node_ids_are_put_together_again() -> None:
    found = passed_by_test(report(case("test_x"), case("test_y[1-2]", dotted="tests.test_a.TestOuter.TestInner")))
    assert found == {"tests/test_a.py::test_x": True, "tests/test_a.py::TestOuter::TestInner::test_y[1-2]": True}


@pytest.mark.parametrize("tag", ["failure", "error", "skipped"])
def test_only_a_pass_is_a_pass(tag: str) -> None:
    assert passed_by_test(report(case("test_x", f"<{tag}/>"))) == {"tests/test_a.py::test_x": False}


def test_a_test_reported_twice_must_pass_twice() -> None:
    cases = (case("test_x"), case("test_x", "<error/>"), case("test_x"))
    assert passed_by_test(report(*cases)) == {"tests/test_a.py::test_x": False}


@pytest.mark.parametrize("bad", [b"", b"1 passed", b"<testsuites>", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'])
def test_what_is_no_report_is_refused(bad: bytes) -> None:
    with pytest.raises(BadReport):
        passed_by_test(bad)
