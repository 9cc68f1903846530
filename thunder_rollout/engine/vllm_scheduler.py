"""vLLM's scheduler with one rule more: what only released programs have in the cache goes first.

A request's `extra_args` say whose turn it is and which programs gave their KV up since the last one. Their
exclusive blocks that no turn holds move to the head of the free list, behind its empty blocks; until they
are taken they can still be hit. So what programs that act have cached is the last to go, where plain
LRU gives it up for what paused and ended programs left behind.

vLLM has no public hook for this. Of its insides this uses `Scheduler.add_request` and `_free_blocks` and
the block pool's `cached_block_hash_to_block` and `free_block_queue`; `engine.vllm_release` asks for it only
in versions where it was tried. It runs in vLLM's engine process, which alone imports this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, takewhile
from typing import Any

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from thunder_rollout.engine.sequences import MAX_EMPTY, Sequences
from thunder_rollout.engine.vllm_release import PROGRAM, RELEASED


class ReleasingScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sequences: Sequences[bytes] = Sequences()

    def add_request(self, request: Any) -> None:
        for program in _said(request, RELEASED) or ():
            self._sequences.release(program)
        self._sequences.begin(_said(request, PROGRAM))
        if self._sequences.has_released:
            self._move_released()
        super().add_request(request)

    def _free_blocks(self, request: Any) -> None:
        program = _said(request, PROGRAM)
        if program is not None:
            self._sequences.put(program, request.block_hashes)
        super()._free_blocks(request)

    def _move_released(self) -> None:
        pool = self.kv_cache_manager.block_pool
        empty = list(islice(takewhile(lambda block: block.block_hash is None, _in_order(pool)), MAX_EMPTY + 1))
        if len(empty) > MAX_EMPTY:
            return
        groups = range(len(self.kv_cache_config.kv_cache_groups))
        blocks = []
        for block_hash in self._sequences.take_released():
            for group in groups:
                block = pool.cached_block_hash_to_block.get_one_block(make_block_hash_with_group_id(block_hash, group))
                if block is not None and block.ref_cnt == 0 and not block.is_null:
                    pool.free_block_queue.remove(block)
                    blocks.append(block)
        pool.free_block_queue.popleft_n(len(empty))
        pool.free_block_queue.prepend_n(blocks)
        pool.free_block_queue.prepend_n(empty)


class ReleasingAsyncScheduler(ReleasingScheduler, AsyncScheduler):
    """The same where vLLM schedules a step ahead."""


def _in_order(pool: Any) -> Iterator[Any]:
    """The free blocks in the order in which they will be taken."""
    queue = pool.free_block_queue
    block = queue.fake_free_list_head.next_free_block
    while block is not None and block is not queue.fake_free_list_tail:
        yield block
        block = block.next_free_block


def _said(request: Any, name: str) -> Any:
    extra = request.sampling_params.extra_args if request.sampling_params is not None else None
    return extra.get(name) if extra else None
