"""From which version of the weights on an episode is not worth finishing.

verl's async samplers with `max_off_policy_strategy=drop` throw a group away once it is more than
`max_off_policy_threshold` steps old. The step that samples is at least one after the version of the weights,
so an episode can know before its end that it will be thrown away, and make room.
"""

from __future__ import annotations

from typing import Any


def stale_from(trainer: Any, dispatched_at: int | None) -> int | None:
    """`trainer` is verl's config group; `dispatched_at` the row's `global_steps`. None: it is never in vain.

    Sampled at step s a group counts s - dispatched_at + 1 steps, and s >= version + 1. Validation, which
    nothing is dropped from, runs under the version of the step it follows.
    """
    if dispatched_at is None or not trainer.use_v1 or trainer.v1.trainer_mode == "sync":
        return None
    sampler = trainer.v1.sampler
    if sampler.max_off_policy_strategy != "drop" or sampler.max_off_policy_threshold is None:
        return None
    first_dropped = dispatched_at + sampler.max_off_policy_threshold - 1
    return int(max(first_dropped, dispatched_at + 1))
