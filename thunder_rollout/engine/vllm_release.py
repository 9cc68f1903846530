"""`engine.release_on_pause` on vLLM: our scheduler in the place of its own, and what a request tells it."""

from __future__ import annotations

import logging
from typing import Any

from thunder_rollout.engine.protocol import GenerateRequest
from thunder_rollout.errors import ConfigError

logger = logging.getLogger(__name__)

TRIED_VERSIONS = ("0.28.",)  # of vLLM: their insides are those that `engine.vllm_scheduler` knows
PROGRAM, RELEASED = "thunder_program", "thunder_released"  # in a request's extra_args


def make_releasing(vllm_config: Any) -> None:
    """Where vLLM is another version, it is told and nothing changed."""
    from vllm import __version__ as version

    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is not None:
        raise ConfigError("engine.extra.scheduler_cls: engine.release_on_pause=true sets it; give one of the two")
    if not version.startswith(TRIED_VERSIONS):
        logger.warning(
            "engine.release_on_pause=true: not tried with vLLM %s (but with %sx); it is off, and the least "
            "recently used blocks go first",
            version,
            "x, ".join(TRIED_VERSIONS),
        )
        return
    from thunder_rollout.engine.vllm_scheduler import ReleasingAsyncScheduler, ReleasingScheduler

    scheduler.scheduler_cls = ReleasingAsyncScheduler if scheduler.async_scheduling else ReleasingScheduler


def release_arguments(request: GenerateRequest) -> dict[str, Any]:
    """The request's extra_args."""
    return {PROGRAM: request.program, RELEASED: list(request.released)}
