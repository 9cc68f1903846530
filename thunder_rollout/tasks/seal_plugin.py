"""Records verdicts inside the tests' own process and seals the record.

The grader copies this file into its sandbox, beside a file `secret`, under two names:
- `thunder_seal.py`, for `pytest -p thunder_seal`;
- `sitecustomize.py`, which Python runs at its start, for a suite whose runner is unittest's
  `TextTestRunner` (Django's) or sympy's.

Either way it is loaded before any code of the repository, takes the secret and deletes it, and
remembers what the runner's own code looked like. When the run ends in good order it writes
`report`: the record's HMAC under the secret, and below it the record as JSON: `passed` (test to
whether it passed, and was neither skipped nor expected to fail; a test that ran twice passed each
time), `skipped`, and `altered` (what of the runner was replaced meanwhile, which of pytest's hooks came or
went, reports that others than pytest gave, and which of the tests' files were written: the tested code runs
before the last of them is read). An entry of `altered` reads the same in every run of an image.

It must run on Python 3.6 with whatever pytest an image has.
"""
# ruff: noqa: UP006, UP035

import builtins
import functools
import hashlib
import hmac
import importlib
import importlib.machinery
import json
import json.encoder
import os
import stat
import sys
import threading
import time
import types
import unittest
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

_AT_START = __name__ == "sitecustomize"
if not _AT_START:
    import pytest

_WATCHED = (
    ("unittest", "hmac", "json") if _AT_START else ("_pytest", "pluggy", "unittest.case", "hmac", "json", "pytest")
)
_SYMPY_RUNNERS = ("sympy.testing.runtests", "sympy.utilities.runtests")
_PHASES = {"setup", "call", "teardown"}
_COARSE_CLOCK = 5  # CLOCK_REALTIME_COARSE, see linux/time.h
_HOOK = "pytest_"
_CODE = (types.FunctionType, types.BuiltinFunctionType, property, classmethod, staticmethod, type)


class Seal:
    """`secret` lives in this closure-like object alone."""

    def __init__(self, folder: str, secret: bytes) -> None:
        self._folder = folder
        self._secret = secret
        self._watched: Tuple[str, ...] = _WATCHED
        self._first = dict(_fingerprints(self._watched))
        self._legacy = _legacy_codes()
        self._tools = (hmac.new, json.dumps, open)
        self._files: Set[str] = set()
        self._stat = os.lstat
        self._began_s = _stamp_s()

    def watch(self, module: str) -> None:
        """Also this module's code is the runner's, as it is now."""
        self._watched += (module,)
        self._first.update(_fingerprints((module,)))

    def note_file(self, path: str) -> None:
        """Tests came from there."""
        self._files.add(os.path.abspath(path))

    def write(self, passed: Dict[str, bool], skipped: Set[str], altered: Set[str]) -> None:
        new, dumps, open_file = self._tools
        altered = altered.union(self._altered())
        record = dumps({"passed": passed, "skipped": sorted(skipped), "altered": sorted(altered)}).encode()
        with open_file(os.path.join(self._folder, "report"), "wb") as file:
            file.write(new(self._secret, record, "sha256").hexdigest().encode() + b"\n" + record)

    def _altered(self) -> List[str]:
        now = dict(_fingerprints(self._watched))
        known = {owner for owner, _ in self._first}
        changed = {key for key, value in self._first.items() if now.get(key) != value}
        # A class that gains a method may hide its parent's by it; modules gain names in good order.
        added = {key for key in now if key not in self._first and ":" in key[0] and key[0] in known}
        odd = {key for key in changed | added if not self._is_pytests_own(key, now.get(key))}
        return [f"{owner}.{name}" for owner, name in odd] + [path for path in self._files if self.is_new(path)]

    def is_new(self, path: str) -> bool:
        """Whether the file, or a link on the way to it, was written since the start; a time of change can't be
        set back."""
        while path != os.path.dirname(path):
            try:
                status = self._stat(path)
            except OSError:
                return True
            if not stat.S_ISDIR(status.st_mode) and status.st_ctime > self._began_s:
                return True
            if stat.S_ISLNK(status.st_mode) and self.is_new(os.path.realpath(path)):
                return True
            path = os.path.dirname(path)
        return False

    def _is_pytests_own(self, key: Tuple[str, str], now: Any) -> bool:
        """pytest's `legacypath` puts its `Node_fspath` into the class Node as `fspath`, and so on, in every run."""
        owner, name = key
        return now is not None and now[1] == self._legacy.get("{}_{}".format(owner.rpartition(":")[2], name))


class HookSeal:
    """Who is called by one of pytest's plugin managers. The hooks that were there before any code of the
    repository stay to the end; those that come are functions that were loaded by then (pytest's, and its
    installed plugins'), under the name they had, or what the repository's conftest files say."""

    def __init__(self, manager: Any, is_new: Callable[[str], bool]) -> None:
        self._manager = manager
        self._is_new = is_new
        self._digest = hashlib.sha256
        self._callers: Dict[str, Any] = dict(vars(manager.hook))
        self._execute = getattr(manager, "_inner_hookexec", None)
        self._loaded = set(_loaded_hooks())
        self._first = {_key(hook, impl): (hook, impl) for hook, impl in self._impls()}

    def altered(self) -> Set[str]:
        now = {_key(hook, impl): (hook, impl) for hook, impl in self._impls()}
        gone = [self._first[key] for key in self._first.keys() - now.keys()]
        come = [now[key] for key in now.keys() - self._first.keys()]
        odd = gone + [(hook, impl) for hook, impl in come if not self._is_in_order(hook, impl)]
        relay = vars(self._manager.hook)
        replaced = {hook for hook, caller in self._callers.items() if relay.get(hook) is not caller}
        if getattr(self._manager, "_inner_hookexec", None) is not self._execute:
            replaced.add("_inner_hookexec")
        return replaced.union(self._told(hook, impl) for hook, impl in odd)

    def _impls(self) -> Iterator[Tuple[str, Any]]:
        for hook, caller in sorted({**vars(self._manager.hook), **self._callers}.items()):
            for impl in caller.get_hookimpls() if hasattr(caller, "get_hookimpls") else ():
                yield hook, impl

    def _is_in_order(self, hook: str, impl: Any) -> bool:
        function = _function(impl.function)
        if (hook, *_identity(function)) in self._loaded:
            return True
        path = getattr(impl.plugin, "__file__", None) or ""
        if not isinstance(impl.plugin, types.ModuleType) or os.path.basename(path) != "conftest.py":
            return False
        if not isinstance(function, types.FunctionType) or function.__globals__ is not vars(impl.plugin):
            return False
        return not self._is_new(path) and function.__code__ in _codes_in(path)

    def _told(self, hook: str, impl: Any) -> str:
        """Without the identity of anything; functions that differ have different digests."""
        code = getattr(_function(impl.function), "__code__", None)
        digest = self._digest(repr(_contents(code)).encode()).hexdigest()[:12]
        name = impl.plugin_name if not impl.plugin_name.isdigit() else type(impl.plugin).__name__
        return f"{hook} of {name} ({digest})"


class PytestSeal:
    """Hooks of one session."""

    def __init__(self, seal: Seal, hooks: HookSeal) -> None:
        self._seal = seal
        self._hooks = hooks
        self._phases: Dict[str, Set[str]] = {}
        self._bad: Set[str] = set()
        self._skipped: Set[str] = set()
        self._given: Dict[str, Set[str]] = {}  # phases that passed by a report of the repository's code
        self._givers: Dict[str, Set[str]] = {}
        self._altered: Set[str] = set()
        self._items: List[Any] = []
        self._thread = threading.get_ident()
        self._loaded = {id(vars(module)) for module in sys.modules.values() if isinstance(module, types.ModuleType)}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The repository's code gives reports in good order too, of a test's parts; they decide where there is no
        other, and are told then."""
        test = report.nodeid
        strangers = set(self._strangers())
        if report.outcome == "rerun":
            self._altered |= strangers
        elif report.outcome == "passed" and strangers:
            self._given.setdefault(test, set()).add(report.when)
            self._givers.setdefault(test, set()).update(strangers)
            return
        if report.outcome == "rerun":  # by a plugin that tries failures again: what follows counts
            self._phases.pop(test, None)
            self._bad.discard(test)
            return
        self._phases.setdefault(test, set()).add(report.when)
        if report.outcome != "passed":
            self._bad.add(test)
        if report.outcome == "skipped":
            self._skipped.add(test)

    def pytest_collection_finish(self, session: Any) -> None:
        self._altered |= self._hooks.altered()
        self._items = [session, session.config, *session.items]
        for item in session.items:
            self._seal.note_file(str(item.fspath))

    def pytest_sessionfinish(self) -> None:
        for test in [test for test in self._given if not self._phases.get(test, set()) >= _PHASES]:
            self._phases.setdefault(test, set()).update(self._given[test])
            self._altered |= self._givers[test]
        passed = {test: phases >= _PHASES and test not in self._bad for test, phases in self._phases.items()}
        altered = self._altered.union(self._hooks.altered(), *map(_overridden, self._items))
        self._seal.write(passed, self._skipped, altered)

    def _strangers(self) -> Iterator[str]:
        """The code, not loaded before the repository's, that gives a report."""
        if threading.get_ident() != self._thread:
            yield "a report from another thread"
        frame: Any = sys._getframe()
        while frame is not None:
            if id(frame.f_globals) not in self._loaded:
                yield f"a report from {frame.f_code.co_filename}"
            frame = frame.f_back


class RunnerSeal:
    """The verdicts of one judge, unittest's result or sympy's reporter: the first that begins in the main
    thread and not in the midst of an import, where tested code runs before the tests. Tests of the repository
    that run tests themselves have others."""

    def __init__(self, seal: Seal) -> None:
        self.seal = seal
        self._thread = threading.get_ident()
        self._judge: Any = None
        self._passed: Dict[str, bool] = {}

    def begin(self, judge: object) -> None:
        if self._judge is None and threading.get_ident() == self._thread and not _is_importing():
            self._judge = judge

    def note_file(self, judge: object, path: str) -> None:
        if judge is self._judge:
            self.seal.note_file(path)

    def note(self, judge: object, test: str, passed: bool) -> None:
        if judge is self._judge:
            self._passed[test] = self._passed.get(test, True) and passed

    def finish(self, judge: object) -> None:
        if judge is self._judge:
            self.seal.write(self._passed, set(), set())


def _seal_unittest(runner: RunnerSeal) -> None:
    result = unittest.TestResult

    def noted(self: Any, test: Any, passed: bool) -> None:
        path = getattr(sys.modules.get(type(test).__module__), "__file__", None)
        if path is not None:
            runner.note_file(self, path)
        runner.note(self, _described(self, test), passed)

    def succeeded(self: Any, test: Any) -> None:
        noted(self, test, True)

    def failed(self: Any, test: Any, *_: Any) -> None:
        noted(self, test, False)

    def subtest_failed(self: Any, test: Any, subtest: Any, error: Any) -> None:
        if error is not None:
            failed(self, test)

    _after(result, "startTestRun", lambda self: runner.begin(self))
    _after(result, "addSuccess", succeeded)

    for name in ("addError", "addFailure", "addSkip", "addExpectedFailure", "addUnexpectedSuccess"):
        _after(result, name, failed)
    _after(result, "addSubTest", subtest_failed)
    run = unittest.TextTestRunner.run

    @functools.wraps(run)
    def sealed_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        ended = run(self, *args, **kwargs)
        runner.finish(ended)
        return ended

    unittest.TextTestRunner.run = sealed_run  # type: ignore[method-assign]


def _described(result: Any, test: Any) -> str:
    """The line that the verbose log has its status on: a test's docstring, where it has one."""
    describe: Callable[[Any], str] = getattr(result, "getDescription", str)
    return (describe(test).splitlines() or [""])[-1].strip()


def _seal_sympy(runner: RunnerSeal, module: types.ModuleType) -> None:
    reporter = getattr(module, "PyTestReporter", None)
    if reporter is None or reporter.__module__ != module.__name__:
        return
    running: Dict[str, str] = {}

    def entered(self: Any, test: Any) -> None:
        running["test"] = test.__name__

    def noted(passed: bool) -> Callable[..., None]:
        return lambda self, *args, **kwargs: runner.note(self, running.get("test", ""), passed)

    _after(reporter, "start", lambda self, *args, **kwargs: runner.begin(self))
    _after(reporter, "entering_filename", lambda self, path, *args, **kwargs: runner.note_file(self, path))
    _after(reporter, "entering_test", entered)
    for name in [name for name in vars(reporter) if name.startswith("test_")]:
        _after(reporter, name, noted(name == "test_pass"))
    _after(reporter, "finish", lambda self: runner.finish(self))
    runner.seal.watch(module.__name__)


def _after(cls: Any, name: str, then: Callable[..., None]) -> None:
    inner = getattr(cls, name)

    @functools.wraps(inner)
    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = inner(self, *args, **kwargs)
        then(self, *args, **kwargs)
        return value

    setattr(cls, name, outer)


def _stamp_s() -> float:
    """Between the times of change of all files that are there and of all that are written after this returns.

    Those times come from a clock that stands still between two ticks, longer where the machine is busy, or from a
    finer one: a tick passes all that was written before, the next one is reached by what is written after."""
    ticks_s = [time.clock_gettime(_COARSE_CLOCK)]
    while len(ticks_s) < 3:
        time.sleep(0.001)
        now_s = time.clock_gettime(_COARSE_CLOCK)
        if now_s != ticks_s[-1]:
            ticks_s.append(now_s)
    return (ticks_s[1] + ticks_s[2]) / 2


def _is_importing() -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class _SympyFinder:
    """Finds sympy's runner as Python does, and seals it before anybody has it."""

    def __init__(self, runner: RunnerSeal) -> None:
        self._runner = runner

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _SYMPY_RUNNERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _seal_sympy(self._runner, module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _fingerprints(tops: Tuple[str, ...]) -> Iterator[Tuple[Tuple[str, str], Tuple[int, int]]]:
    """Of every function and class of the watched modules: ((owner, name), (identity, its code's))."""
    watched = [
        (name, module)
        for name, module in sorted(sys.modules.items())
        if isinstance(module, types.ModuleType) and any(name == top or name.startswith(top + ".") for top in tops)
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


def _loaded_hooks() -> Iterator[Tuple[str, int, int]]:
    """(name, identity, its code's) of what any module or its classes hold under a hook's name."""
    for module in list(sys.modules.values()):
        owners: List[Any] = [module] if isinstance(module, types.ModuleType) else []
        owners += [value for owner in owners for value in list(vars(owner).values()) if isinstance(value, type)]
        for owner in owners:
            for name, value in list(vars(owner).items()):
                if name.startswith(_HOOK):
                    yield (name, *_identity(_function(value)))


def _function(value: Any) -> Any:
    return getattr(value, "__func__", value)


def _key(hook: str, impl: Any) -> Tuple[str, int, int, int]:
    return (hook, id(impl.plugin), *_identity(_function(impl.function)))


def _codes_in(path: str) -> List[types.CodeType]:
    """Of the functions in a file of Python; those that pytest gives its own asserts are not among them."""
    with open(path, "rb") as file:
        found = [compile(file.read(), path, "exec", dont_inherit=True)]
    for code in found:
        found += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return found


def _contents(part: Any) -> Any:
    """A code object as plain values that are the same in every process."""
    if isinstance(part, types.CodeType):
        return part.co_code, part.co_names, [_contents(inner) for inner in part.co_consts]
    return sorted(map(repr, part)) if isinstance(part, frozenset) else repr(part)


def _overridden(thing: Any) -> Set[str]:
    """Methods of its class that an object has others for."""
    cls = type(thing)
    own = [name for name in getattr(thing, "__dict__", ()) if isinstance(getattr(cls, name, None), types.FunctionType)]
    return {f"{cls.__name__}.{name} of one object" for name in own}


def _legacy_codes() -> Dict[str, int]:
    legacy = sys.modules.get("_pytest.legacypath")
    functions = vars(legacy).items() if legacy else ()
    own = {name: id(value.__code__) for name, value in functions if isinstance(value, types.FunctionType)}
    return {name.replace("stardir", "startdir"): code for name, code in own.items()}  # as pytest 7 spells it


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


def pytest_load_initial_conftests(early_config: Any) -> None:
    """Before the repository's conftest files, which run the tested code."""
    if _seals:
        seal, manager = _seals.pop(), early_config.pluginmanager
        PytestSeal.pytest_sessionfinish = pytest.hookimpl(trylast=True)(PytestSeal.pytest_sessionfinish)  # type: ignore[method-assign]
        manager.register(PytestSeal(seal, HookSeal(manager, seal.is_new)), "thunder_sealing")


if not _AT_START:
    pytest_load_initial_conftests = pytest.hookimpl(tryfirst=True)(pytest_load_initial_conftests)


def _start_up(seals: List[Seal]) -> None:
    """As `sitecustomize`; the image's own, if it has one, comes after."""
    if seals:
        runner = RunnerSeal(seals.pop())
        _seal_unittest(runner)
        runner.seal.watch("unittest")
        sys.meta_path.insert(0, _SympyFinder(runner))
    del sys.modules["sitecustomize"]
    try:
        importlib.import_module("sitecustomize")
    except ImportError:
        sys.modules["sitecustomize"] = types.ModuleType("sitecustomize")


_seals: List[Seal] = []
_folder = os.path.dirname(os.path.abspath(__file__))
_secret = _take_secret(_folder)
_hide(_folder)
if _secret:
    _seals.append(Seal(_folder, _secret))
del _secret
if _AT_START:
    _start_up(_seals)
