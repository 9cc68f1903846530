"""verl's trainer without a GPU: the platform `cpu`, a plug-in of the group `verl.plugins`.

verl imports this module at the end of `import verl`. Contract: on a machine or a torch build with an accelerator
it only adds a name to verl's registry, and changes nothing; where the platform is `cpu` it patches the places
that `cpu_patches` lists. The platform is chosen by `VERL_PLATFORM=cpu`, and by itself where torch is built for
CPUs alone. verl hides what a plug-in raises, so an untested verl is refused where the platform is first used.

A run needs, besides: `trainer.device=cpu`, `actor.strategy=fsdp2`, a number of GPUs told to Ray
(`+ray_kwargs.ray_init.num_gpus=N`, one a rank) and vLLM's worker extension `cpu_worker.CpuWorkerExtension`;
`recipes/verl_cpu_toy` has them all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from thunder_rollout.verl_adapter.cpu_patches import patch_verl
from thunder_rollout.verl_adapter.versions import UnsupportedVerl, require_tested_verl

NAME = "cpu"
# What vLLM's CPU build takes unless the user says otherwise.
_ROLLOUT_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several processes share the cores
    "OMP_NUM_THREADS": "1",
}


def is_cpu_only_build() -> bool:
    """Whether this torch was built for no accelerator, whatever the machine has."""
    return torch.accelerator.current_accelerator() is None


def is_chosen() -> bool:
    """Whether verl's platform will be this one, by the rules of verl's own detection."""
    named = os.environ.get("VERL_PLATFORM", "").strip().lower()
    return named == NAME if named else is_cpu_only_build()


class CpuDevice(ModuleType):
    """`torch.cpu`, and what verl asks of `torch.cuda` besides: no memory of its own to report or to free."""

    def __init__(self) -> None:
        super().__init__("torch.cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        """verl asks this before it measures or frees device memory, of which there is none."""
        return False

    def get_device_name(self, device: Any = None) -> str:
        return NAME

    def empty_cache(self) -> None: ...

    def ipc_collect(self) -> None: ...

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None: ...

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes of the host."""
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


@PlatformRegistry.register(platform=NAME)
class CpuPlatform(PlatformBase):
    """Ranks are processes, collectives are gloo's, weights travel by shared memory.

    Ray's resource stays "GPU": verl places one rank on each, and Ray takes any number that it is told.
    """

    device_name = NAME
    vendor_name = NAME
    device_module = CpuDevice()

    def is_available(self) -> bool:
        require_tested_verl()  # here, since verl swallows the errors of everything that comes before
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return is_chosen()

    def current_device(self) -> str:
        return NAME  # verl hands it to torch as a device; a number is an accelerator's

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"  # Ray sets it for the resource "GPU"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        return {name: os.environ.get(name, value) for name, value in _ROLLOUT_ENVIRONMENT.items()}

    def cudart(self) -> None:
        return None


def _start() -> None:
    if not is_chosen():
        return
    try:
        require_tested_verl()
    except UnsupportedVerl:
        return  # told by `CpuPlatform.is_available`
    # verl registers its FSDP engine for "cuda" and "npu"; nothing in it needs either
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    patch_verl()


_start()
