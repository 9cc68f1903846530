"""Everything that knows verl: nothing else in this project imports it.

Contract: made for the verl release that `versions.py` names; router, manager, sampler, agent loop and CPU platform
refuse another one, `ProgramRouter` and `Manager` (by the names that they have here) before anything of verl's inside is
imported. Importing this package imports neither verl nor Ray: these two are loaded when they are asked for.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("ProgramRouter", "Manager"):
        from thunder_rollout.verl_adapter.versions import require_tested_verl

        require_tested_verl()
    if name == "ProgramRouter":
        from thunder_rollout.verl_adapter.router.actor import ProgramRouter

        return ProgramRouter
    if name == "Manager":
        from thunder_rollout.verl_adapter.manager import Manager

        return Manager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
