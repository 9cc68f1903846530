"""Everything that knows verl: nothing else in this project imports it.

Contract: made for the verl release that `versions.py` names; every part that verl starts by itself refuses
another one. Importing this package imports neither verl nor Ray: `ProgramRouter` and `Manager` are loaded when
they are asked for.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "ProgramRouter":
        from thunder_rollout.verl_adapter.router.actor import ProgramRouter

        return ProgramRouter
    if name == "Manager":
        from thunder_rollout.verl_adapter.manager import Manager

        return Manager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
