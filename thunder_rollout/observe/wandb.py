"""The run on wandb, through its own library: offline unless the user is logged in."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from thunder_rollout.errors import ConfigError
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
            default = "online" if wandb.login(prompt=False, verify=False) else "offline"
            mode = os.environ.get("WANDB_MODE", default)
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                tags=config.tags or None,
                name=folder.name,
                id=_run_id(folder),
                resume="allow",
                dir=str(folder),
                config=settings,
                mode=mode,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"observe.wandb: wandb refuses the run ({error}); mend it, or set observe.wandb.mode=offline"
            ) from error

    def log(self, values: dict[str, float]) -> None:
        if self._run is not None:
            self._run.log(values)

    def finish(self, summary: dict[str, Any]) -> None:
        """Idempotent."""
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish()
            self._run = None


def _run_id(folder: Path) -> str:
    """Made once and kept in the run folder, so that a resumed run goes on in its own wandb run."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()
