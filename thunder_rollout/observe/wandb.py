"""The run on wandb, through its own library: offline unless the user is logged in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from thunder_rollout.observe.config import WandbConfig


class WandbRun:
    """One wandb run beside one run folder. `log` takes flat names, verl's where verl has one."""

    def __init__(self, config: WandbConfig, folder: Path, settings: dict[str, Any]) -> None:
        """Blocks for a second or two while wandb's own process starts."""
        self._run: Any = None
        if config.mode == "disabled":
            return
        import wandb  # imported here: it costs a second that a disabled run need not pay

        mode = config.mode if config.mode != "auto" else _mode_for_user(wandb)
        os.environ.setdefault("WANDB_SILENT", "true")
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            tags=config.tags or None,
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=str(folder),
            config=settings,
            mode=mode,
        )

    def log(self, values: dict[str, float]) -> None:
        if self._run is not None:
            self._run.log(values)

    def finish(self, summary: dict[str, Any]) -> None:
        """Idempotent."""
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish()
            self._run = None


def _mode_for_user(wandb: Any) -> str:
    return "online" if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else "offline"
