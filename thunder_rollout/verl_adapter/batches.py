"""Batches in verl's V0 form, and what is read of rows, of either form or in their files."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
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
            kind = schema.field("extra_info").type if "extra_info" in schema.names else pyarrow.null()
            if pyarrow.types.is_struct(kind) and kind.get_field_index("image") >= 0:
                column = parquet.ParquetFile(file).read(columns=["extra_info.image"]).column("extra_info")
                images |= dict.fromkeys(images_of(column.to_pylist()))
    return list(images)


def settle_failed_rows(output: DataProto, groups: Sequence[str] | None) -> None:
    """Give each row that the machinery kept from an end the mean score of the rest of its group, or of the batch where
    the group has no other: whole as it is masked it gives no gradient, and it leaves the mean where it is (a group's
    standard deviation becomes smaller by the root of the share that was played). `groups` names each row's."""
    rows = output.non_tensor_batch.get("thunder")
    if rows is None or groups is None or "rm_scores" not in output.batch:
        return
    scores, accuracies = output.batch["rm_scores"], output.non_tensor_batch.get("acc")
    failed = {place for place, row in enumerate(rows) if row and FAILURE in row}
    of_group: dict[str, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        if place not in failed:
            of_group[group].append(place)
    of_all = list(itertools.chain.from_iterable(of_group.values()))
    for place in failed if of_all else ():
        rest = of_group[groups[place]] or of_all
        scores[place] = 0.0
        scores[place, 0] = scores[rest].sum() / len(rest)
        if accuracies is not None:
            accuracies[place] = sum(float(accuracies[other]) for other in rest) / len(rest)
