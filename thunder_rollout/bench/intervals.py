"""Means with 95% intervals of Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# two-sided 95% quantiles with 1, 2, ... degrees of freedom
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z_95 = 1.95996


@dataclass(frozen=True, slots=True)
class Interval:
    """`mean` plus or minus `half_width`, which is nan for a single value."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        """As in `1.25 ± 0.16`; a single value stands alone."""
        if math.isnan(self.half_width):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def interval(values: Sequence[float]) -> Interval:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan)
    return Interval(mean, _t_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def paired_ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Of the values that share a key (a seed); None where none does."""
    ratios = [ours[key] / theirs[key] for key in ours if theirs.get(key)]
    return interval(ratios) if ratios else None


def _t_95(freedom: int) -> float:
    """From the table, beyond it by the first terms of the expansion around the normal quantile."""
    if freedom <= len(_T_95):
        return _T_95[freedom - 1]
    z = _Z_95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
