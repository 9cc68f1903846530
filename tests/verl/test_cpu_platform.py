"""The platform verl gets on a machine without a GPU, and that it stays out of the way on others."""

from __future__ import annotations

import pytest
import torch
import verl  # noqa: F401  loads the plug-in
from verl.plugin.platform import PlatformRegistry, platform_manager
from verl.utils import distributed

from thunder_rollout.verl_adapter import cpu, versions


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_PLATFORM", raising=False)


def test_verl_finds_the_platform_by_itself() -> None:
    assert PlatformRegistry.get("cpu") is cpu.CpuPlatform
    assert platform_manager._detect_platform_name() == "cpu"
    assert hasattr(distributed.initialize_global_process_group_ray, "__wrapped__")


def test_it_answers_everything_that_verl_asks_of_a_platform() -> None:
    platform = cpu.CpuPlatform()
    assert torch.zeros(1, device=platform.current_device()).device.type == "cpu"
    assert platform.ray_resource_options(2) == {"num_gpus": 2}
    assert platform.device_module.mem_get_info()[1] > 0
    state = platform.device_module.get_rng_state()
    first = torch.rand(1)
    platform.device_module.set_rng_state(state)
    assert torch.rand(1) == first
    with platform.nvtx_range("step"):
        platform.device_module.empty_cache()


def test_what_the_user_sets_for_the_engine_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert cpu.CpuPlatform().rollout_env_vars()["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """True once the plug-in has patched verl."""
    calls: list[bool] = []
    monkeypatch.setattr(cpu, "patch_verl", lambda: calls.append(True))
    return calls


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))


def test_inert_where_torch_knows_an_accelerator(patched: list[bool], cuda_build: None) -> None:
    cpu._start()
    assert not cpu.CpuPlatform().is_platform_available(use_smi_check=True)
    assert not patched


def test_a_user_may_ask_for_it_anyway(patched: list[bool], cuda_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "CPU")
    cpu._start()
    assert patched


def test_another_platform_asked_for_by_name_is_left_alone(patched: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    cpu._start()
    assert not patched


def test_an_untested_verl_is_refused_where_the_platform_is_used(
    patched: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.10.0")
    cpu._start()
    assert not patched
    with pytest.raises(versions.UnsupportedVerl, match=r"0\.10\.0"):
        platform_manager._create_platform("cpu")
