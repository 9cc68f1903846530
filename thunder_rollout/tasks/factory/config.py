"""Settings of the task factory."""

from __future__ import annotations

from dataclasses import dataclass, field

from thunder_rollout.errors import ConfigError
from thunder_rollout.tasks.factory.operators import OPERATORS
from thunder_rollout.tasks.grading import GradingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoryConfig:
    """The source distribution is `package` at `version` from the package index or, if given, `path`: an
    archive or a folder. `requirements` are what its tests need beside pytest, pure Python alone."""

    package: str
    version: str | None = None
    path: str | None = None
    requirements: list[str] = field(default_factory=list)
    out: str | None = None  # .jsonl or .parquet; None: runs/tasks/<package>-<version>.jsonl
    count: int = 20
    seed: int = 0
    operators: list[str] = field(default_factory=lambda: list(OPERATORS))
    max_tried: int = 400  # bugs, before giving up on `count`
    max_per_function: int = 2  # tasks whose bug is in the same function
    max_failed_share: float = 0.5  # of the suite's tests
    suite_timeout_s: float = 120.0  # of a run without a bug; with one it is five times what that took, or 10 s
    concurrency: int = 2  # sandboxes at once
    validate: bool = True
    grading: GradingConfig = field(default_factory=GradingConfig)

    def __post_init__(self) -> None:
        _require(bool(self.package), "package", self.package, "a package's name")
        _require(bool(self.path or self.version), "version", self.version, "the package's pinned version, or give path")
        for name in ("count", "max_tried", "max_per_function", "concurrency"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        _require(0 < self.max_failed_share <= 1, "max_failed_share", self.max_failed_share, "> 0 and <= 1")
        _require(self.suite_timeout_s > 0, "suite_timeout_s", self.suite_timeout_s, "> 0")
        unknown = sorted(set(self.operators) - set(OPERATORS))
        _require(not unknown and bool(self.operators), "operators", self.operators, f"some of {', '.join(OPERATORS)}")
        _require(
            self.out is None or self.out.endswith((".jsonl", ".parquet")), "out", self.out, "a .jsonl or .parquet file"
        )


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={value!r}: must be {rule}")
