"""Where verl 0.9.1's trainer takes for granted that its device is not the CPU, each mended with its reason.

`tests/verl/test_cpu_patches.py` fails for a patch that verl or torch needs no more. The engine's side is in
`cpu_worker`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any


def patch_verl() -> None:
    """Once a process, before verl's workers are imported; what only a training rank needs waits until one starts."""
    _patch_backends()


def _patch_backends() -> None:
    """verl asks for gloo on the CPU and for the device's own backend on the device: "cpu:gloo,cpu:gloo" here, and
    torch refuses a device that is named twice."""
    from verl.utils import distributed

    original = distributed.initialize_global_process_group_ray

    @wraps(original)
    def with_one_backend(timeout_second: int | None = None, backend: str | None = None) -> None:
        _patch_training()
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = with_one_backend


def _patch_training() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy
    from verl.utils import fsdp_utils

    if not hasattr(fsdp_utils.fsdp2_sharded_save_to_cpu, "__wrapped__"):
        CPUOffloadPolicy.__init__ = _without_pinning(CPUOffloadPolicy.__init__)
        fsdp_utils.fsdp2_sharded_save_to_cpu = _copying(fsdp_utils.fsdp2_sharded_save_to_cpu)


def _without_pinning(make: Any) -> Any:
    """FSDP2's offloading, which verl uses for every reference model, pins the host's memory for transfers to a
    device: torch raises where there is none. verl asks for it by name, so the class itself is told."""

    @wraps(make)
    def make_unpinned(self: Any, pin_memory: bool = False) -> None:
        make(self, pin_memory=False)

    return make_unpinned


def _copying(save: Any) -> Any:
    """verl keeps old weights by `.detach().cpu()`, which copies from a device. On the CPU it is the live weights
    themselves, which the optimiser then changes: old log-probabilities would be silently wrong (separate_async)."""

    @wraps(save)
    def save_copies(model: Any) -> tuple[dict[str, tuple[Any, Any]], Any]:
        shards, spec = save(model)
        return {name: (shard.clone(), own_spec) for name, (shard, own_spec) in shards.items()}, spec

    return save_copies
