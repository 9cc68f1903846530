"""Rows of published data sets, made into rows as `rows` reads them.

Each data set has its own columns, its own rule for an image's name and its own way to run and to
name tests. A row with an image of its own (`image_name`, `docker_image`) keeps it. What a rollout
can't judge is a `TaskError` that says why, when the row is read. Nothing is downloaded here, and
images are pulled when a run starts.

| source | told by | graded |
|---|---|---|
| `swe_bench` (Verified, Lite) | `environment_setup_commit` | pytest repositories, django, sympy |
| `swe_gym` | `test_patch`, no image | pytest |
| `swe_smith` | an image named swesmith, or no `base_commit` | pytest; `patch` is the bug, its reverse the reference |
| `swe_rebench` | `install_config` | pytest |
| `r2e_gym` | `expected_output_json` | every test has its expected status; no reference patch |
| `plain` | anything else with an image | as its columns say, see `rows` |

All but R2E-Gym's images keep a conda environment named testbed, which is put first on PATH.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thunder_rollout.errors import TaskError
from thunder_rollout.tasks.patches import BadPatch, reverse_patch
from thunder_rollout.tasks.rows import IMAGE_COLUMNS
from thunder_rollout.tasks.suites import is_doctest, r2e_name, test_file

Row = dict[str, Any]

AUTO = "auto"
WORKDIR = "/testbed"
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CONDA_ENV = {
    "PATH": f"/opt/miniconda3/envs/testbed/bin:/opt/miniconda3/condabin:{_SYSTEM_PATH}",
    "CONDA_PREFIX": "/opt/miniconda3/envs/testbed",
    "CONDA_DEFAULT_ENV": "testbed",
}
_R2E_ENV = {"PATH": f"{WORKDIR}/.venv/bin:/root/.local/bin:{_SYSTEM_PATH}"}
_PYTEST = "pytest -rA -p no:cacheprovider"
_DJANGO = "./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1"
_DJANGO_1_9 = "./tests/runtests.py --verbosity 2"  # its --parallel writes no names
_SYMPY = "PYTHONWARNINGS='ignore::UserWarning,ignore::SyntaxWarning' bin/test -C --verbose"
_R2E = "ln -sfn /r2e_tests r2e_tests && bash run_tests.sh"
_R2E_HIDDEN = (
    "/r2e_tests",
    "r2e_tests",
    "run_tests.sh",
    "syn_issue.json",
    *(f"{part}.json" for part in ("expected_test_output", "execution_result", "parsed_commit")),
    *(f"{part}.json" for part in ("modified_files", "modified_entities")),
)
_BUG_PATCH = "/var/tmp/bug.patch"


@dataclass(frozen=True, slots=True)
class Source:
    """`columns` are in all its rows; a row that has them and is `likely` is taken for one."""

    name: str
    columns: tuple[str, ...]
    adapt: Callable[[Row], Row]
    likely: Callable[[Row], bool] = lambda row: True


def adapt_row(row: Row, source: str, where: str) -> Row:
    """`row` with the columns of `rows`; raises `TaskError`, which starts with `where`."""
    chosen = _detect(row) if source == AUTO else next(known for known in reversed(SOURCES) if known.name == source)
    missing = [column for column in chosen.columns if row.get(column) is None]
    if missing:
        raise TaskError(f"{where}: {missing[0]} is missing, which every row of {chosen.name} has; set task.source")
    try:
        return row | chosen.adapt(row)
    except _Unusable as error:
        raise TaskError(f"{where} ({chosen.name}, instance_id={row.get('instance_id')}): {error}") from error


class _Unusable(ValueError):
    """What is wrong with a row, and what to do."""


def _detect(row: Row) -> Source:
    return next(
        source
        for source in SOURCES
        if all(row.get(column) is not None for column in source.columns) and source.likely(row)
    )


def _swe_bench(row: Row) -> Row:
    repo, version = row.get("repo"), row.get("version")
    suite, command = "pytest", _PYTEST
    if repo == "django/django":
        suite, command = "django", _DJANGO_1_9 if version == "1.9" else _DJANGO
    elif repo == "sympy/sympy":
        suite, command = "sympy", _SYMPY
    return _conda(row, "swebench/sweb.eval.x86_64.{}:latest", "_1776_", command) | {"suite": suite}


def _swe_gym(row: Row) -> Row:
    return _conda(row, "xingyaoww/sweb.eval.x86_64.{}:latest", "_s_", _PYTEST)


def _swe_rebench(row: Row) -> Row:
    config = _decoded(row, "install_config")
    command = config.get("test_cmd") or _PYTEST if isinstance(config, dict) else _PYTEST
    if "pytest" not in command:
        raise _Unusable(f"install_config.test_cmd is {command!r}; only pytest suites can be graded, leave the row out")
    return _conda(row, "swerebench/sweb.eval.x86_64.{}:latest", "_1776_", command)


def _swe_smith(row: Row) -> Row:
    """The image is the repository without the bug: the bug goes in, and the tests that show it out of
    the agent's sight; but doctests, which are where the code is."""
    bug = row["patch"]
    tests = _decoded(row, "FAIL_TO_PASS")
    if not isinstance(tests, list):
        raise _Unusable("FAIL_TO_PASS must be a list of test names")
    try:
        fix = reverse_patch(bug)
    except BadPatch as error:
        raise _Unusable(f"patch can't be reversed ({error}); leave the row out") from error
    image = row["image_name"]
    if "/" not in image:
        image = f"jyangballin/{image.replace('__', '_1776_')}:latest".lower()
    return {
        "image_name": image,
        "env": _CONDA_ENV,
        "test_command": _PYTEST,
        "base_commit": "HEAD",
        "patch": fix,
        "files": {_BUG_PATCH: base64.b64encode(bug.encode()).decode()},
        "workdir": WORKDIR,
        "self_contained": False,
        "setup": f"cd {WORKDIR} && git apply --index --whitespace=nowarn {_BUG_PATCH} && rm {_BUG_PATCH}",
        "hidden_paths": list(dict.fromkeys(test_file(test) for test in tests if not is_doctest(test))),
    }


def _r2e_gym(row: Row) -> Row:
    """`commit_hash` is the fix; the image stands before it, with uncommitted files that an agent's
    patch must not contain (`gitscrub` commits them). The virtual environment is kept out of that."""
    expected = _decoded(row, "expected_output_json")
    if isinstance(expected, dict):  # a struct of parquet has the names of all rows
        expected = {test: status for test, status in expected.items() if status is not None}
    if not isinstance(expected, dict) or not expected or not all(isinstance(it, str) for it in expected.values()):
        raise _Unusable("expected_output_json must map test names to their statuses")
    passing = [r2e_name(test) for test in expected if expected[test] == "PASSED"]
    others = [r2e_name(test) for test in expected if expected[test] != "PASSED"]
    commit = row.get("commit_hash") or row["docker_image"].rpartition(":")[2]
    return {
        "instance_id": f"{row['repo_name']}__{commit}",
        "repo": row["repo_name"],
        "base_commit": "HEAD",
        "problem_statement": _between(row.get("problem_statement") or "", "[ISSUE]", "[/ISSUE]"),
        "expected_output_json": json.dumps(expected),
        "FAIL_TO_PASS": passing or others,
        "PASS_TO_PASS": others if passing else [],
        "env": _R2E_ENV,
        "suite": "r2e",
        "workdir": WORKDIR,
        "test_command": _R2E,
        "hidden_paths": list(_R2E_HIDDEN),
        "setup": f"cd {WORKDIR} && {{ [ -L .venv ] || [ ! -d .venv ] || {{ mv .venv /root/.venv"
        " && ln -s /root/.venv .venv; }; }",
    }


def _plain(row: Row) -> Row:
    return {}


def _is_smith(row: Row) -> bool:
    return "swesmith" in row["image_name"] or row.get("base_commit") is None


def _has_no_image(row: Row) -> bool:
    return not any(row.get(name) for name in IMAGE_COLUMNS)


SOURCES = (  # the first that fits wins
    Source("plain", ("test_command",), _plain),
    Source("r2e_gym", ("expected_output_json", "docker_image", "repo_name"), _r2e_gym),
    Source("swe_rebench", ("install_config", "base_commit"), _swe_rebench),
    Source("swe_smith", ("image_name", "patch", "FAIL_TO_PASS"), _swe_smith, _is_smith),
    Source("swe_bench", ("environment_setup_commit", "base_commit"), _swe_bench),
    Source("swe_gym", ("base_commit", "test_patch"), _swe_gym, _has_no_image),
    Source("plain", (), _plain),
)
SOURCE_NAMES = (AUTO, *dict.fromkeys(source.name for source in SOURCES))


def _conda(row: Row, image: str, separator: str, command: str) -> Row:
    """What the data sets that build on SWE-bench's images share."""
    own = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
    instance = str(row.get("instance_id")).replace("__", separator).lower()
    image = own or image.format(instance)
    return {"image_name": image, "env": _CONDA_ENV, "test_command": command, "workdir": WORKDIR}


def _decoded(row: Row, column: str) -> Any:
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise _Unusable(f"{column} is a string but not JSON ({error}); write it as JSON") from error


def _between(text: str, opening: str, closing: str) -> str:
    """What stands between the two marks; all of it where there are none."""
    _, mark, rest = text.partition(opening)
    return rest.partition(closing)[0].strip() if mark else text
