"""One run of a package's whole suite in a fresh sandbox."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from thunder_rollout.sandbox.protocol import Sandbox, SandboxLimits, SandboxSpec
from thunder_rollout.tasks.environment import top_modules
from thunder_rollout.tasks.factory.package import SITE, WORKDIR, Package
from thunder_rollout.tasks.report import BadReport, failures_by_test, passed_by_test

Fresh = Callable[[SandboxSpec], AbstractAsyncContextManager[Sandbox]]

# Neither the repository's pytest configuration nor installed plugins take part; its conftest files do.
TEST_COMMAND = (
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -q --tb=short -c /dev/null --rootdir=. -p no:cacheprovider"
)
_REPORT = "/tmp/report.xml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the package is: in `image` already or, if not `built`, brought along into each sandbox."""

    package: Package
    image: str
    built: bool
    limits: SandboxLimits = field(default_factory=SandboxLimits)

    def files(self, changed: Mapping[str, bytes]) -> dict[str, bytes]:
        """For a sandbox's `files`: absolute path to content."""
        repository = dict(changed) if self.built else {**self.package.files, **changed}
        site = {} if self.built else self.package.site
        return {f"{WORKDIR}/{path}": content for path, content in repository.items()} | {
            f"{SITE}/{path}": content for path, content in site.items()
        }

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": self.package.python_path}


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRun:
    """`passed` by node id, `failures` as pytest tells them; `trouble` if there was no report."""

    passed: dict[str, bool] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    trouble: str = ""
    log: str = ""
    took_s: float = 0.0


async def run_suite(place: Place, changed: Mapping[str, bytes], fresh: Fresh, timeout_s: float) -> SuiteRun:
    """The suite with some files `changed`. Raises `SandboxFailed`."""
    spec = SandboxSpec(
        image=place.image,
        workdir=WORKDIR,
        files=place.files(changed),
        env=place.env,
        limits=place.limits,
        hidden_modules=top_modules(place.package.files),
    )
    async with fresh(spec) as sandbox:
        command = f"{TEST_COMMAND} -o junit_family=xunit1 --junitxml={_REPORT} {' '.join(_roots(place.package))}"
        ran = await sandbox.exec(command, timeout_s=timeout_s)
        if ran.timed_out:
            return SuiteRun(trouble="timed out", log=ran.output, took_s=ran.took_s)
        try:
            report = await sandbox.read_file(_REPORT)
            passed, failures = passed_by_test(report), failures_by_test(report)
        except (FileNotFoundError, BadReport):
            return SuiteRun(trouble="no report", log=ran.output, took_s=ran.took_s)
    return SuiteRun(passed=passed, failures=failures, log=ran.output, took_s=ran.took_s)


def _roots(package: Package) -> list[str]:
    """The test files' folders, or the files where they lie at the top."""
    return list(dict.fromkeys(path.rpartition("/")[0] or path for path in package.test_files))
