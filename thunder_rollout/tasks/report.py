"""Verdicts test by test, read from pytest's JUnit report.

What a test prints can't pass for a verdict: only the report's structure is read. A test that
appears twice passes only if it passed each time; skipped and expected failures are not passes.
"""

from __future__ import annotations

from xml.etree import ElementTree

_NOT_PASSED = ("failure", "error", "skipped")


class BadReport(ValueError):
    """Not a JUnit report."""


def passed_by_test(report: bytes) -> dict[str, bool]:
    """Node id (`path::Class::name`) to whether it passed. The report's family must be xunit1,
    the one that names the file. Raises `BadReport`."""
    verdicts: dict[str, bool] = {}
    for case in _cases(report):
        test = _node_id(case)
        passed = not any(case.find(tag) is not None for tag in _NOT_PASSED)
        verdicts[test] = verdicts.get(test, True) and passed
    return verdicts


def failures_by_test(report: bytes) -> dict[str, str]:
    """Node id to pytest's account of its failure, for tests that failed or broke. Raises `BadReport`."""
    return {
        _node_id(case): trouble.text or trouble.get("message") or ""
        for case in _cases(report)
        for trouble in [*case.findall("failure"), *case.findall("error")][:1]
    }


def _cases(report: bytes) -> list[ElementTree.Element]:
    if b"<!ENTITY" in report:
        raise BadReport("the report declares entities")
    try:
        return list(ElementTree.fromstring(report).iter("testcase"))
    except ElementTree.ParseError as error:
        raise BadReport(f"the report isn't XML: {error}") from None


def _node_id(case: ElementTree.Element) -> str:
    """pytest writes `classname` as the dotted path and then the classes."""
    file, dotted, name = case.get("file", ""), case.get("classname", ""), case.get("name", "")
    module = file.removesuffix(".py").replace("/", ".")
    classes = dotted.removeprefix(module).strip(".")
    return "::".join([file, *(classes.split(".") if classes else ()), name])
