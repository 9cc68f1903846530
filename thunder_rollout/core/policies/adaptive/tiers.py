"""The prefix tree where a backend may have a second tier of KV, in host memory.

A tier is a pool of its own in the tree, under a bound of its own, in which nothing is bound. Engines
store through: what a backend used it has in its tier too, and the least recently used goes first. So
nobody orders what is offloaded (vLLM offers no such choice at a pause): what the tier holds of a program
is loaded, what it has dropped is computed again, and a pause costs what that costs.

In the simulator (load 4) a tier of five pools gained `adaptive` 7% of the steps of `mini_swe_agent` and 5%
of `tool_orchestration` on h100x8_glm46_fp8 (4 seeds, 3 to 13%), 20 to 26% on rtx5090_qwen3_8b, where prefill
is dearer. Where loading costs 1% of prefill, as there, `sticky` with the tier is ahead by another 8 to 14%:
nothing is left to schedule for but the turns that run.
"""

from __future__ import annotations

from collections.abc import Iterator

from thunder_rollout.core.prefix import PrefixTree

_TIER = "\0host"  # behind the backend's name


class TieredTree(PrefixTree):
    def __init__(self) -> None:
        super().__init__()
        self._tiers: dict[str, str] = {}  # by backend

    def set_tier(self, backend: str, max_blocks: int) -> None:
        """The known backend's tier; 0 blocks: it has none."""
        if max_blocks:
            self._tiers[backend] = backend + _TIER
            self.add_backend(backend + _TIER, max_blocks)
        elif backend in self._tiers:
            self.remove_backend(self._tiers.pop(backend))

    def hold(self, program: str, backend: str, num_blocks: int | None = None) -> None:
        super().hold(program, backend, num_blocks)
        if backend in self._tiers:
            super().hold(program, self._tiers[backend], num_blocks)

    def offloaded_blocks(self, program: str, backend: str) -> int:
        """How many leading blocks of the program's sequence the backend's tier holds."""
        return self.held_blocks(program, self._tiers[backend]) if backend in self._tiers else 0

    def holders(self, program: str) -> Iterator[str]:
        """As before, by either tier; a backend may come twice."""
        for name in super().holders(program):
            yield name.removesuffix(_TIER)

    def forget_held(self, backend: str) -> None:
        """Its cache is empty now, and its tier."""
        super().forget_held(backend)
        if backend in self._tiers:
            super().forget_held(self._tiers[backend])
