"""A pytest plugin that records verdicts inside the tests' own process and seals the record.

The grader copies this file into its sandbox as `thunder_seal.py`, beside a file `secret`, and runs
the tests with `-p thunder_seal`. It is loaded before any code of the repository, takes the secret
and deletes it, and remembers what pytest's own code looked like. When the session ends it writes
`report`: the record's HMAC under the secret, and below it the record as JSON: `passed` (node id to
whether it passed setup, call and teardown, and was neither skipped nor expected to fail), and
`altered` (what of the runner was replaced meanwhile).

It must run on Python 3.6 with whatever pytest an image has.
"""
# ruff: noqa: UP006, UP035

import builtins
import hmac
import json
import json.encoder
import os
import sys
import types
from typing import Any, Dict, Iterator, List, Set, Tuple

import pytest

_WATCHED = ("_pytest", "pluggy", "unittest.case", "hmac", "json", "pytest")
_PHASES = {"setup", "call", "teardown"}
_CODE = (types.FunctionType, types.BuiltinFunctionType, property, classmethod, staticmethod, type)


class Seal:
    """Hooks of one session; `secret` lives in this closure-like object alone."""

    def __init__(self, folder: str, secret: bytes) -> None:
        self._folder = folder
        self._secret = secret
        self._phases: Dict[str, Set[str]] = {}
        self._bad: Set[str] = set()
        self._first = dict(_fingerprints())
        self._legacy = _legacy_codes()
        self._tools = (hmac.new, json.dumps, open)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid
        if report.outcome == "rerun":  # by a plugin that tries failures again: what follows counts
            self._phases.pop(test, None)
            self._bad.discard(test)
            return
        self._phases.setdefault(test, set()).add(report.when)
        if report.outcome != "passed":
            self._bad.add(test)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        new, dumps, open_file = self._tools
        passed = {test: phases >= _PHASES and test not in self._bad for test, phases in self._phases.items()}
        record = dumps({"passed": passed, "altered": self._altered()}).encode()
        with open_file(os.path.join(self._folder, "report"), "wb") as file:
            file.write(new(self._secret, record, "sha256").hexdigest().encode() + b"\n" + record)

    def _altered(self) -> List[str]:
        now = dict(_fingerprints())
        known = {owner for owner, _ in self._first}
        changed = {key for key, value in self._first.items() if now.get(key) != value}
        # A class that gains a method may hide its parent's by it; modules gain names in good order.
        added = {key for key in now if key not in self._first and ":" in key[0] and key[0] in known}
        odd = {key for key in changed | added if not self._is_pytests_own(key, now.get(key))}
        return sorted(f"{owner}.{name}" for owner, name in odd)

    def _is_pytests_own(self, key: Tuple[str, str], now: Any) -> bool:
        """pytest's `legacypath` puts its `Node_fspath` into the class Node as `fspath`, and so on, in every run."""
        owner, name = key
        return now is not None and now[1] == self._legacy.get("{}_{}".format(owner.rpartition(":")[2], name))


def _fingerprints() -> Iterator[Tuple[Tuple[str, str], Tuple[int, int]]]:
    """Of every function and class of the watched modules: ((owner, name), (identity, its code's))."""
    watched = [
        (name, module)
        for name, module in sorted(sys.modules.items())
        if isinstance(module, types.ModuleType) and any(name == top or name.startswith(top + ".") for top in _WATCHED)
    ]
    for name, module in [*watched, ("builtins", builtins)]:
        for attribute, value in sorted(vars(module).items()):
            if isinstance(value, _CODE):
                yield (name, attribute), _identity(value)
            if isinstance(value, type) and value.__module__ == name and name != "builtins":
                for member, inner in sorted(vars(value).items()):
                    if isinstance(inner, _CODE):
                        yield (f"{name}:{attribute}", member), _identity(inner)


def _identity(value: Any) -> Tuple[int, int]:
    function = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
    return id(value), id(getattr(function, "__code__", None))


def _legacy_codes() -> Dict[str, int]:
    legacy = sys.modules.get("_pytest.legacypath")
    functions = vars(legacy).items() if legacy else ()
    return {name: id(value.__code__) for name, value in functions if isinstance(value, types.FunctionType)}


def _take_secret(folder: str) -> bytes:
    """b"" in a process that is not the first to ask, such as a worker of pytest-xdist."""
    path = os.path.join(folder, "secret")
    try:
        with open(path, "rb") as file:
            secret = file.read()
        os.remove(path)
    except FileNotFoundError:
        return b""
    return secret


def _hide(folder: str) -> None:
    """Put `PYTHONPATH` and `sys.path` back to what they are without the grader."""
    sys.path[:] = [entry for entry in sys.path if entry != folder]
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = os.pathsep.join(entry for entry in entries if entry and entry != folder)
    if others:
        os.environ["PYTHONPATH"] = others
    else:
        os.environ.pop("PYTHONPATH", None)


def pytest_configure(config: Any) -> None:
    if _seals:
        config.pluginmanager.register(_seals.pop(), "thunder_sealing")


_seals: List[Seal] = []
_folder = os.path.dirname(os.path.abspath(__file__))
_secret = _take_secret(_folder)
_hide(_folder)
if _secret:
    _seals.append(Seal(_folder, _secret))
del _secret
