"""Batches in verl's V0 form, and what is read of rows, of either form or in their files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet
from verl.protocol import DataProto

from thunder_rollout.verl_adapter.output import FAILURE


def images_of(extra_infos: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """The images of the rows that name one, in their order."""
    return [extra["image"] for extra in extra_infos if extra and extra.get("image")]


def images_of_files(files: Iterable[str]) -> list[str]:
    """Every image that rows of these parquet files name, each once; files elsewhere than here are passed over."""
    images: dict[str, None] = {}
    for file in files:
        if file.endswith(".parquet") and Path(file).is_file():
            schema = parquet.read_schema(file)
            if "extra_info" in schema.names and "image" in [field.name for field in schema.field("extra_info").type]:
                column = parquet.ParquetFile(file).read(columns=["extra_info.image"]).column("extra_info")
                images |= dict.fromkeys(images_of(column.to_pylist()))
    return list(images)


def settle_failed_rows(output: DataProto, groups: Sequence[str] | None) -> None:
    """Give each row that the machinery kept from an end the mean score of the rest of its group: whole as it
    is masked it gives no gradient, and so it leaves the group's mean where it is. `groups` names each row's."""
    rows = output.non_tensor_batch.get("thunder")
    if rows is None or groups is None or "rm_scores" not in output.batch:
        return
    failed = {place for place, row in enumerate(rows) if row and FAILURE in row}
    scores = output.batch["rm_scores"]
    of_group: dict[str, list[float]] = defaultdict(list)
    for place, group in enumerate(groups):
        if place not in failed:
            of_group[group].append(float(scores[place].sum()))
    for place in failed:
        rest = of_group[groups[place]]
        scores[place] = 0.0
        scores[place, 0] = sum(rest) / len(rest) if rest else 0.0
