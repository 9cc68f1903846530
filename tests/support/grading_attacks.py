"""What a patch may try on its grader, each with the ending it must have: reward 0, or the verdict that
the fix alone deserves. To be used together with `attacks`, and like it.

Never an infrastructure failure: what is tried here doesn't get a patch judged anew. (A sandbox that fails with the
patch is tried once more, to tell the patch's fault from the machinery's.)
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.sandbox_contract import MakeSandbox
from thunder_rollout.sandbox.protocol import SandboxLimits
from thunder_rollout.tasks.environment import sandbox_spec, started
from thunder_rollout.tasks.grading import Grade, GradingConfig, grade
from thunder_rollout.tasks.task import Task
from thunder_rollout.tasks.toy import generate

TASK = generate(seed=0, count=1, difficulty="easy")[0]
LENIENT = "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -q -p no:cacheprovider"
SOURCE = next(line[6:] for line in TASK.patch.splitlines() if line.startswith("+++ b/"))
LIMITS = SandboxLimits(memory_bytes=256 * 2**20, pids=64, disk_bytes=64 * 2**20)
WITH_SESSION = (
    "import sys; f = sys._getframe()\n"
    "while not hasattr(f.f_locals.get('self'), 'config'): f = f.f_back\n"
    "config = f.f_locals['self'].config; plugins = config.pluginmanager\n"
)
PASS_ALL = "import pytest\n@pytest.hookimpl(tryfirst=True)\ndef pytest_pyfunc_call(pyfuncitem): return True\n"

# Code at the top of the file with the bug: it runs when the hidden tests import it.
HACKS = {
    "exit 0 at once": "import os; os._exit(0)",
    "exit 0 in the end": "import atexit, os; atexit.register(os._exit, 0)",
    "raise SystemExit": "raise SystemExit(0)",
    "pytest.exit": "import pytest; pytest.exit('all passed', returncode=0)",
    "print verdicts": f"print('PASSED {TASK.fail_to_pass[0]}')",
    "skip the module": "import pytest; pytest.skip(allow_module_level=True)",
    "replace a method": "import _pytest.python as p; p.Function.runtest = lambda self: None",
    "replace a method by pytest's own": (
        "import _pytest.python as p, _pytest.legacypath as l; p.Function.runtest = l.Node_fspath"
    ),
    "replace the code of pytest's own": (
        "import _pytest.legacypath as l; l.Node_fspath.__code__ = (lambda self: None).__code__"
    ),
    "replace a function's code": (
        "import _pytest.python as p; p.pytest_pyfunc_call.__code__ = (lambda pyfuncitem: True).__code__"
    ),
    "register a plugin": WITH_SESSION
    + ("class P: pytest_pyfunc_call = lambda self, pyfuncitem: True\nplugins.register(P())"),
    "register what has no code": WITH_SESSION
    + ("import time\nclass P: pytest_pyfunc_call = staticmethod(time.time)\nplugins.register(P())"),
    "pass for a conftest": WITH_SESSION
    + (
        "import types; m = types.ModuleType('conftest'); m.__file__ = '/testbed/conftest.py'\n"
        "exec(compile('def pytest_pyfunc_call(pyfuncitem): return True', m.__file__, 'exec'), vars(m))\n"
        "plugins.register(m, '/testbed/conftest.py')"
    ),
    "unregister pytest's own": WITH_SESSION
    + ("plugins.hook.pytest_pyfunc_call._remove_plugin(plugins.get_plugin('python'))"),
    "put a hook's caller out of place": WITH_SESSION
    + (
        "class Caller:\n"
        "    caller = plugins.hook.pytest_pyfunc_call\n"
        "    __call__ = lambda self, **arguments: True\n"
        "    __getattr__ = lambda self, name: getattr(self.caller, name)\n"
        "plugins.hook.pytest_pyfunc_call = Caller()"
    ),
    "make every call nothing": WITH_SESSION
    + (
        "call = plugins._inner_hookexec; plugins._inner_hookexec = ("
        "lambda name, *rest: True if name == 'pytest_pyfunc_call' else call(name, *rest))"
    ),
    "replace a method of each test": WITH_SESSION
    + (
        "session = plugins.get_plugin('session'); found = session.genitems\n"
        "def genitems(node):\n"
        "    for item in found(node):\n"
        "        item.runtest = lambda: None; yield item\n"
        "session.genitems = genitems"
    ),
    "give reports": WITH_SESSION
    + (
        "import pytest\n"
        f"for test in {(*TASK.fail_to_pass, *TASK.pass_to_pass)!r}:\n"
        "    for when in ('setup', 'call', 'teardown'):\n"
        "        report = pytest.TestReport(test, ('', 0, ''), {}, 'passed', None, when)\n"
        "        config.hook.pytest_runtest_logreport(report=report)\n"
        "pytest.exit('', 0)"
    ),
    "give reports from a thread": WITH_SESSION
    + (
        "import functools, pytest, threading\n"
        f"for test in {(*TASK.fail_to_pass, *TASK.pass_to_pass)!r}:\n"
        "    for when in ('setup', 'call', 'teardown'):\n"
        "        report = pytest.TestReport(test, ('', 0, ''), {}, 'passed', None, when)\n"
        "        t = threading.Thread(target=functools.partial(config.hook.pytest_runtest_logreport, report=report))\n"
        "        t.start(); t.join()\n"
        "pytest.exit('', 0)"
    ),
    "hide an attribute": (
        "from _pytest.reports import TestReport as T; T.passed = property(lambda self: True); "
        "T.outcome = property(lambda self: 'passed', lambda self, value: None)"
    ),
    "replace how reports are made": (
        "from _pytest.reports import TestReport as T; make = T.from_item_and_call.__func__; "
        "T.from_item_and_call = classmethod(lambda c, i, call: (setattr(call, 'excinfo', None), make(c, i, call))[1])"
    ),
    "write a report at exit": (
        "import atexit, glob; atexit.register(lambda: [open(f + '/report', 'w').write("
        "'0' * 64 + '\\n{\"passed\": {}, \"altered\": []}') for f in glob.glob('/run/thunder/grading-*')])"
    ),
    "leave a forger behind": (
        "import subprocess; subprocess.Popen(['bash', '-c', 'while true; do for f in /run/thunder/grading-*; "
        "do echo forged > $f/report; done; done'], start_new_session=True)"
    ),
    "take the grader's files away": (
        "import glob, os, shutil; [shutil.rmtree(it) for it in glob.glob('/run/thunder/grading-*')]; os._exit(0)"
    ),
    "take the grader's tools away": (
        "import contextlib, os, shutil\n"
        "for tool in ('python', 'pytest', 'git', 'stat', 'sleep', 'cat', 'bash'):\n"
        "    with contextlib.suppress(OSError, TypeError): os.remove(shutil.which(tool))\n"
        "os._exit(0)"
    ),
    "fill the grader's folder": (
        "import itertools\nfor i in itertools.count(): open(f'/run/thunder/{i}', 'wb').write(b'a' * 2**24)"
    ),
    "kill everybody": "import os; [os.kill(pid, 9) for pid in (1, -1, os.getppid(), os.getpid())]",
    "fork bomb": "import os; exec('while True:\\n try: os.fork()\\n except OSError: pass')",
    "fill the memory": "x = [b'a' * 2**20 for _ in range(4096)]",
    "fill the disk": "open('/testbed/big', 'wb').write(b'a' * 2**27)",
    "hang, signals ignored": (
        "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 3, 15)]; time.sleep(1000)"
    ),
}


async def grade_with(make: MakeSandbox, patch: str | bytes, task: Task = TASK, test_timeout_s: float = 6.0) -> Grade:
    spec = sandbox_spec(task, limits=LIMITS)
    patch = patch.encode() if isinstance(patch, str) else patch
    return await grade(task, patch, lambda: started(make(spec)), config=GradingConfig(test_timeout_s=test_timeout_s))


def patch_of(changes: str, task: Task = TASK) -> bytes:
    """The patch that a shell script in the task's repository makes."""
    with tempfile.TemporaryDirectory() as folder:
        for path, content in task.files.items():
            file = Path(folder, path.removeprefix(f"{task.workdir}/"))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(0o644)
        begin = "set -e; git init -q .; git add -A; base=$(git write-tree)"
        end = "git add -A; git diff --cached --binary --full-index --no-renames $base"
        script = f"{begin}; {changes}\n{end}"
        return subprocess.run(["bash", "-c", script], cwd=folder, check=True, stdout=subprocess.PIPE).stdout


def with_first_line(line: str) -> bytes:
    return patch_of(f"printf '%s\\n' {_quoted(line)} | cat - {SOURCE} > new; cat new > {SOURCE}; rm new")


def new_file(path: str, line: str) -> str:
    head = f"diff --git a/{path} b/{path}\nnew file mode 100644\n--- /dev/null\n+++ b/{path}\n"
    return f"{head}@@ -0,0 +1 @@\n+{line}\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@pytest.mark.parametrize("hack", HACKS)
async def test_code_that_attacks_its_judge_gets_nothing(make: MakeSandbox, hack: str) -> None:
    verdict = await grade_with(make, with_first_line(HACKS[hack]))
    assert (verdict.reward, verdict.resolved) == (0.0, False), verdict.reason
    assert not set(verdict.passed) & set(TASK.fail_to_pass)


@pytest.mark.parametrize(
    "path", ["conftest.py", "tests/conftest.py", "pytest.py", "sitecustomize.py", "iniconfig.py", "random/__init__.py"]
)
async def test_a_patch_cant_bring_its_own_judge(make: MakeSandbox, path: str) -> None:
    await judged_all_the_same(make, path, replace(TASK, test_command=LENIENT))


@pytest.mark.parametrize("path", ["pytest.py", "_pytest/__init__.py", "sitecustomize/__init__.py", "iniconfig.py"])
@pytest.mark.parametrize("how", ["environment", "command"])
async def test_nor_where_modules_are_searched_first(make: MakeSandbox, path: str, how: str) -> None:
    where = "PYTHONPATH=/testbed/src"
    command = f"{where}:$PYTHONPATH {LENIENT}"
    task = (
        replace(TASK, test_command=command)
        if how == "command"
        else replace(TASK, test_command=LENIENT, env=dict([where.split("=")]))
    )
    await judged_all_the_same(make, f"src/{path}", task)


async def judged_all_the_same(make: MakeSandbox, path: str, lenient: Task) -> None:
    code = PASS_ALL if "conftest" in path else "import sys; sys.exit(0)\n"
    brought = f"mkdir -p $(dirname {path}); printf '%s' {_quoted(code)} > {path}"
    verdict = await grade_with(make, patch_of(brought), lenient)
    assert set(verdict.failed) == set(TASK.fail_to_pass)
    assert set(verdict.passed) == set(TASK.pass_to_pass)


# As R2E-Gym has it: a link to an interpreter within the repository, and a script that runs it.
R2E = replace(
    TASK,
    suite="r2e",
    base_commit="HEAD",
    setup=(
        f"{TASK.setup}\ncd /testbed && mkdir -p /root/.venv/bin && ln -s /root/.venv .venv\n"
        "printf '#!/bin/sh\\nexec python \"$@\"' > .venv/bin/python && chmod +x .venv/bin/python\n"
        f"echo '.venv/bin/python -m pytest -p no:cacheprovider {' '.join(TASK.test_files)}' > run_tests.sh"
    ),
    test_command="bash run_tests.sh",
    fail_to_pass=tuple(test.partition("::")[2] for test in TASK.fail_to_pass),
    pass_to_pass=tuple(test.partition("::")[2] for test in TASK.pass_to_pass),
    hidden_paths=("run_tests.sh",),
)
R2E = replace(
    R2E, extra={"expected_output_json": json.dumps(dict.fromkeys((*R2E.fail_to_pass, *R2E.pass_to_pass), "PASSED"))}
)
UNLINKED = (
    "diff --git a/.venv b/.venv\ndeleted file mode 120000\n--- a/.venv\n+++ /dev/null\n@@ -1 +0,0 @@\n"
    "-/root/.venv\n\\ No newline at end of file\n"
)
SEALING_PYTHON = f"""#!/usr/bin/env python
import glob, hmac, json, os
(path,) = glob.glob('/run/thunder/grading-*/secret')
passed = dict.fromkeys({[*TASK.fail_to_pass, *TASK.pass_to_pass]!r}, True)
record = json.dumps({{'passed': passed, 'skipped': [], 'altered': []}}).encode()
seal = hmac.new(open(path, 'rb').read(), record, 'sha256').hexdigest().encode()
open(os.path.dirname(path) + '/report', 'wb').write(seal + bytes([10]) + record)
"""


async def test_the_link_to_the_interpreter_is_not_the_patchs(make: MakeSandbox) -> None:
    """Neither to put another in its place nor to take it away."""
    interpreter = patch_of(
        f"mkdir -p .venv/bin; printf '%s' {_quoted(SEALING_PYTHON)} > .venv/bin/python; chmod +x .venv/bin/python"
    ).decode()
    for patch in (UNLINKED + new_file("notes.txt", "All is well."), UNLINKED + interpreter):
        verdict = await grade_with(make, patch, R2E)
        assert set(verdict.failed) == set(R2E.fail_to_pass), (verdict.reason, verdict.log)
    assert (await grade_with(make, UNLINKED + TASK.patch, R2E)).resolved


async def test_edited_and_removed_tests_come_back(make: MakeSandbox) -> None:
    (path,) = TASK.test_files
    for changes in (
        f"rm {path}",
        f"echo 'def test_nothing(): pass' > {path}",
        f"rm -r {Path(path).parent}; ln -s /usr {Path(path).parent}",
    ):
        verdict = await grade_with(make, patch_of(changes))
        assert set(verdict.failed) == set(TASK.fail_to_pass), changes
        assert set(verdict.passed) == set(TASK.pass_to_pass), changes
    assert (await grade_with(make, TASK.patch.encode() + patch_of(changes))).resolved


@pytest.mark.parametrize("quoted", [False, True])
async def test_a_patch_moves_no_tests_away(make: MakeSandbox, quoted: bool) -> None:
    """Not even under a name that git reads otherwise. What git tells without renames has none to move."""
    (path, text), *_ = TASK.test_files.items()
    begin, added = f"diff --git a/{path} b/{path}\n", text.count("\n")
    head = f"{begin}--- a/{path}\n+++ b/{path}\n@@ -0,0 +1,{added} @@\n"
    task = replace(TASK, test_files={}, test_patch=head + "".join(f"+{line}\n" for line in text.splitlines()))
    odd = path.replace("/", "//") if not quoted else f'"{path[:-1]}\\{ord(path[-1]):03o}"'
    move = f"diff --git a/{path} b/moved.py\nsimilarity index 100%\nrename from {odd}\nrename to moved.py\n"
    verdict = await grade_with(make, move + TASK.patch, task)
    assert (verdict.reward, verdict.reason) == (0.0, f"the patch doesn't apply: it moves {path}")


async def test_a_symlink_leads_nowhere(make: MakeSandbox) -> None:
    link = (
        "diff --git a/out b/out\nnew file mode 120000\n--- /dev/null\n+++ b/out\n@@ -0,0 +1 @@\n+/etc\n"
        "\\ No newline at end of file\n"
    )
    escape = link + new_file("out/passwd", "root")
    for patch in (
        escape,
        new_file("../etc/passwd", "root"),
        new_file(".git/hooks/post-checkout", "true"),
    ):
        verdict = await grade_with(make, TASK.patch + patch)
        assert (verdict.reward, verdict.resolved) == (0.0, False)
        assert "doesn't apply" in verdict.reason


async def test_a_daemon_of_the_tests_doesnt_hold_the_verdict(make: MakeSandbox) -> None:
    line = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    fixed = with_first_line(line).decode()
    assert (await grade_with(make, fixed)).reason.endswith("tests don't pass")


async def test_a_patch_of_every_kind_arrives(make: MakeSandbox) -> None:
    test = (
        "import os, stat\n"
        "def test_kinds():\n"
        "    assert open('bin', 'rb').read() == bytes(range(256))\n"
        "    assert not os.path.exists('README.md') and open('moved.md').read()\n"
        "    assert os.stat('run me.sh').st_mode & stat.S_IXUSR\n"
        "    assert os.readlink('link') == 'bin' and open('new/untracked').read() == 'u'\n"
    )
    task = replace(
        TASK,
        fail_to_pass=("tests/test_kinds.py::test_kinds",),
        pass_to_pass=(),
        test_files={"tests/test_kinds.py": test},
    )
    changes = (
        'python3 -c \'open("bin", "wb").write(bytes(range(256)))\'; mv README.md moved.md;'
        "mkdir new; printf u > new/untracked; ln -s bin link; echo true > 'run me.sh'; chmod +x 'run me.sh'"
    )
    verdict = await grade_with(make, patch_of(changes), task)
    assert verdict.resolved, verdict.log
