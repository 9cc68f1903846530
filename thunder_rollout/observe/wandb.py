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
        os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb is imported
        import wandb  # here, since it costs a second that a disabled run need not pay

        mode: Any = config.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
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
