"""What weights may be handed over, and how they reach another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from thunder_rollout.engine.weights import (
    FolderWeights,
    LocalBucket,
    MemoryWeights,
    check_weights,
    files_of,
    tensor_shapes,
)
from thunder_rollout.errors import WeightsRefused

TENSORS = {"a.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b.bias": torch.ones(4)}
SHAPES = {"a.weight": (2, 3), "b.bias": (4,)}


def test_tensors_in_memory_are_a_file_for_another_process_and_nothing_stays() -> None:
    source = MemoryWeights.of(TENSORS)
    assert tensor_shapes(source) == SHAPES
    (file,) = files_of(source)
    with file as path:
        script = "import sys; from safetensors.torch import load_file; print(load_file(sys.argv[1])['a.weight'].sum())"
        command = [sys.executable, "-c", script, path]
        assert "15." in subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert torch.equal(load_file(path)["a.weight"], TENSORS["a.weight"])
    assert not Path(path).exists()


def test_buckets_are_bounded_and_made_and_opened_one_at_a_time() -> None:
    told: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, size in enumerate((10, 20, 15, 100, 1, 2)):
            told.append(f"tensor {number}")
            yield f"t{number}", torch.full((size,), number, dtype=torch.uint8)

    def keep(image: object) -> LocalBucket:
        told.append("bucket")
        return LocalBucket(image=image)

    source = MemoryWeights.of(tensors(), bucket_bytes=40, keep=keep)
    assert told == [
        *("tensor 0", "tensor 1", "tensor 2", "bucket"),
        *("tensor 3", "bucket"),
        *("tensor 4", "bucket"),
        *("tensor 5", "bucket"),
    ]
    together: dict[str, torch.Tensor] = {}
    for file in files_of(source):
        with file as path:
            part = load_file(path)
            assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 40
            together |= part
    assert {name: tuple(tensor.shape) for name, tensor in together.items()} == source.shapes
    assert all((together[f"t{number}"] == number).all() for number in range(6))


def test_the_files_of_a_folder_are_themselves(tmp_path: Path) -> None:
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    paths = []
    for file in files_of(FolderWeights(path=str(tmp_path))):
        with file as path:
            paths.append(Path(path))
    assert paths == [tmp_path / "a.weight.safetensors", tmp_path / "b.bias.safetensors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_file(TENSORS, folder / "model.safetensors")
    return str(folder)


def test_the_tensors_of_several_files_count_together(tmp_path: Path, model: str) -> None:
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    check_weights(FolderWeights(path=str(tmp_path)), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b.bias": None}, "lacks tensor 'b.bias', 1 in all"),
        ({"c.weight": torch.ones(1)}, "has an unknown tensor 'c.weight', 1 in all"),
        ({"a.weight": torch.ones(3, 2)}, r"a.weight has shape \(3, 2\), the model's is \(2, 3\)"),
    ],
)
def test_what_would_leave_a_mixture_is_refused(tmp_path: Path, model: str, change: dict, message: str) -> None:
    tensors = {name: tensor for name, tensor in (TENSORS | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    for source in (FolderWeights(path=str(tmp_path)), MemoryWeights.of(tensors, bucket_bytes=1)):
        with pytest.raises(WeightsRefused, match=message):
            check_weights(source, model)


def test_a_tied_head_may_be_handed_over(tmp_path: Path, model: str) -> None:
    save_file(TENSORS | {"lm_head.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    check_weights(FolderWeights(path=str(tmp_path)), model)


def test_an_empty_folder_and_a_torn_file_are_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(WeightsRefused, match=r"no \*\.safetensors there"):
        check_weights(FolderWeights(path=str(tmp_path)), model)
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(WeightsRefused, match="not a whole safetensors file"):
        check_weights(FolderWeights(path=str(tmp_path)), model)
