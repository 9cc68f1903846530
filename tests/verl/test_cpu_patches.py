"""Each patch of the CPU platform, beside what happens without it: a failure of a `..._alone_...` test says that
verl, torch or vLLM needs the patch no more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import verl  # noqa: F401  loads the plug-in
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from verl.utils import distributed, fsdp_utils
from verl.workers.engine import EngineRegistry

from thunder_rollout.verl_adapter.cpu_patches import _copying, _without_pinning

initialise = distributed.initialize_global_process_group_ray
# A test before may have started a rank, and with it the patches.
_MAKE = getattr(CPUOffloadPolicy.__init__, "__wrapped__", CPUOffloadPolicy.__init__)
_SAVE = getattr(fsdp_utils.fsdp2_sharded_save_to_cpu, "__wrapped__", fsdp_utils.fsdp2_sharded_save_to_cpu)


@pytest.fixture(autouse=True)
def rendezvous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DIST_INIT_METHOD", f"file://{tmp_path}/rendezvous")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def mesh(rendezvous: None):
    torch.distributed.init_process_group("cpu:gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def test_verl_alone_has_no_training_engine_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the platform sets VERL_ENGINE_DEVICE."""
    import verl.workers.engine.fsdp  # noqa: F401  registers itself

    engines = EngineRegistry._engines["language_model"]["fsdp2"]
    assert "cuda" in engines
    assert "cpu" not in engines


def test_verl_alone_names_the_cpu_twice_to_torch() -> None:
    with pytest.raises(ValueError, match="cpu"):
        initialise.__wrapped__()


def test_ranks_join_one_gloo_group() -> None:
    initialise()
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total == 1.0


def test_a_backend_that_verl_names_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **kwargs: asked.append(kwargs["backend"]))
    initialise(backend="gloo")
    assert asked == ["gloo"]


def sharded(mesh, policy=None) -> torch.nn.Module:
    model = torch.nn.Linear(4, 4, bias=False)
    return fully_shard(model, mesh=mesh, **({"offload_policy": policy} if policy else {}))


def test_torch_alone_cannot_pin_memory_without_a_device(mesh) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUOffloadPolicy, "__init__", _MAKE)
        policy = CPUOffloadPolicy(pin_memory=True)
    with pytest.raises(RuntimeError, match="accelerator"):
        sharded(mesh, policy)


def test_an_offloaded_model_runs(mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUOffloadPolicy, "__init__", _without_pinning(_MAKE))
    model = sharded(mesh, CPUOffloadPolicy(pin_memory=True))
    assert model(torch.ones(1, 4)).shape == (1, 4)


def weight_after_restoring(save, mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight when it was saved, and after a change and verl's restoring of what was saved."""
    model = sharded(mesh)
    before = model.weight.to_local().detach().clone()
    saved = save(model)
    with torch.no_grad():
        model.weight.to_local().add_(1.0)
    fsdp_utils.fsdp2_sharded_load_from_cpu(model, *saved)
    return before, model.weight.to_local().detach()


def test_verl_alone_keeps_the_live_weights_for_old_ones(mesh) -> None:
    before, after = weight_after_restoring(_SAVE, mesh)
    assert not torch.equal(before, after)


def test_old_weights_are_restored(mesh) -> None:
    before, after = weight_after_restoring(_copying(_SAVE), mesh)
    assert torch.equal(before, after)


def packed_layer(process) -> torch.nn.Module:
    layer = torch.nn.Linear(32, 64, bias=False).requires_grad_(False)
    process(SimpleNamespace(), layer)
    return layer


def test_vllm_alone_deletes_what_a_reload_writes_to() -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    assert packed_layer(UnquantizedLinearMethod.process_weights_after_loading).weight.numel() == 0


def test_a_layer_follows_its_weight_after_packing_it_again() -> None:
    from thunder_rollout.verl_adapter.cpu_worker import _pack_and_keep

    layer, inputs = packed_layer(_pack_and_keep), torch.ones(2, 32)
    for scale in (1.0, 3.0):
        layer.weight.mul_(scale)
        _pack_and_keep(SimpleNamespace(), layer)
        torch.testing.assert_close(layer.cpu_linear(inputs, layer.weight, None), inputs @ layer.weight.T)
