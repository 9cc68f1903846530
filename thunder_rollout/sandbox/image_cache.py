"""Which images a node keeps, pulls and evicts: a pure state machine, no Docker, no clock.

What is held never passes the budget. Held is: every layer of an image that is there or being
pulled, once however many images share it, and for each pull the room its compressed layers take
until they are unpacked, and what sandboxes that were put away have left on the disk. An image in use
(pinned), being pulled, or that no registry gives back (fixed) is never evicted.

Who goes first is told by the order of uses to come (`expect`): the image whose bytes would be
pulled again the latest (a layer another image needs sooner counts as needed then), so that with
images that share nothing it is the one whose next use is furthest away. Without a further use
it goes at once. An image whose sample is under way but not in a sandbox right now goes only after
those. Last go images with an unknown future: nobody named them to us, so somebody else may need
them; among these the least recently used goes first, which is also the rule for a node that is
told no order at all.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_BLOCKS_SHARE = 0.15  # what a file system adds to files' bytes: half a block each, folders (5 to 19% measured)
LAYER_BYTES = 65_536  # what an engine adds a layer: its folders, the list of its files


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """`key` names a layer together with what lies under it: that is what an engine stores once."""

    key: str
    pull_bytes: int  # compressed, as the registry sends it
    disk_bytes: int  # unpacked


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """`layers` from the bottom up."""

    name: str
    layers: tuple[Layer, ...]


def layer_keys(diff_ids: Iterable[str]) -> list[str]:
    """Docker's chain ids: of each layer (by the digest of its unpacked content) upon those below."""
    keys: list[str] = []
    for diff_id in diff_ids:
        keys.append(f"sha256:{hashlib.sha256(f'{keys[-1]} {diff_id}'.encode()).hexdigest()}" if keys else diff_id)
    return keys


def disk_bytes(content_bytes: int) -> int:
    """What a layer of so many unpacked bytes takes on the disk, at most."""
    return int(content_bytes * (1 + _BLOCKS_SHARE)) + LAYER_BYTES


class ImageCache:
    """One node's images. `budget_bytes` None: nothing is ever evicted."""

    def __init__(self, budget_bytes: int | None) -> None:
        self.budget_bytes = budget_bytes
        self._known: dict[str, Image] = {}
        self._users: dict[str, set[str]] = {}  # of a layer: the known images it is part of
        self._present: dict[str, None] = {}  # least recently used first
        self._pulling: dict[str, None] = {}
        self._fixed: set[str] = set()
        self._pins: Counter[str] = Counter()
        self._open: Counter[str] = Counter()
        self._uses: dict[str, deque[int]] = {}  # positions in the order
        self._named: set[str] = set()
        self._position = 0
        self._kept_bytes = 0  # of sandboxes put away

    def describe(self, image: Image) -> None:
        """Learn (again) what an image is made of, wherever it is."""
        old = self._known.get(image.name)
        for layer in old.layers if old else ():
            self._users[layer.key].discard(image.name)
        self._known[image.name] = image
        for layer in image.layers:
            self._users.setdefault(layer.key, set()).add(image.name)

    def knows(self, name: str) -> bool:
        return name in self._known

    def add(self, image: Image, *, fixed: bool = False) -> None:
        """The image is on the node. `fixed`: it can't be pulled again, so it stays."""
        self.describe(image)
        self._pulling.pop(image.name, None)
        self._present[image.name] = None
        if fixed:
            self._fixed.add(image.name)

    def remove(self, name: str) -> None:
        """The image is no longer on the node."""
        self._present.pop(name, None)

    def begin_pull(self, name: str) -> None:
        """Its room is taken from now on; ends with `add` or `abandon_pull`."""
        assert name in self._known, name
        self._pulling[name] = None

    def abandon_pull(self, name: str) -> None:
        self._pulling.pop(name, None)

    def pin(self, name: str) -> None:
        """One more sandbox needs the image, there or not."""
        self._pins[name] += 1
        self._touch(name)

    def unpin(self, name: str) -> None:
        self._pins[name] -= 1
        if self._pins[name] <= 0:
            del self._pins[name]
        self._touch(name)

    def keep(self, num_bytes: int) -> None:
        """A sandbox is put away, and leaves so much on the disk until `give_back`."""
        self._kept_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._kept_bytes -= num_bytes

    def expect(self, order: Iterable[str]) -> None:
        """The images of the uses to come, in their order; replaces what was expected before."""
        self._uses = {}
        self._position = 0
        for position, name in enumerate(order):
            self._uses.setdefault(name, deque()).append(position)
        self._named |= self._uses.keys()

    def started(self, name: str) -> None:
        """A use begins: the image's next one in the order, or one that nobody expected."""
        self._open[name] += 1
        self._named.add(name)
        if positions := self._uses.get(name):
            self._position = max(self._position, positions.popleft())
            if not positions:
                del self._uses[name]

    def finished(self, name: str) -> None:
        self._open[name] -= 1
        if self._open[name] <= 0:
            del self._open[name]

    def is_present(self, name: str) -> bool:
        return name in self._present

    def present(self) -> list[str]:
        return list(self._present)

    def may_go(self, name: str) -> bool:
        return not self._pins[name] and name not in self._fixed and name not in self._pulling

    def upcoming(self, num_uses: int) -> list[str]:
        """The images of the next uses, soonest first, each once."""
        last = self._position + num_uses
        soon = ((positions[0], name) for name, positions in self._uses.items() if positions[0] <= last)
        return [name for _, name in sorted(soon)][:num_uses]

    @property
    def held_bytes(self) -> int:
        return self._held(self._present)

    def excess_bytes(self, name: str) -> int:
        """By how much the budget misses the room that pulling the image takes, everything that can
        ever go gone; 0 if it can be pulled some day. (With its lower layers there it may fit now.)"""
        if self.budget_bytes is None:
            return 0
        return max(0, self._least_bytes(name) - self.budget_bytes)

    def plan_pull(self, name: str, *, ahead: bool = False) -> tuple[str, ...] | None:
        """The images to evict, so that this one can be pulled; None if it doesn't fit now.

        `ahead`: before its use is due. Then only images go that are needed later than it is.
        """
        image = self._known[name]
        candidates = [v for v in self._present if self.may_go(v) and v != name]
        if ahead:
            due = self._next_use(name)
            candidates = [v for v in candidates if v in self._named and not self._open[v] and self._next_use(v) > due]
        return self._evictions(candidates, image)

    def plan_keep(self, num_bytes: int) -> tuple[str, ...] | None:
        """The images to evict, so that a sandbox of so many bytes can be put away; None if it can't now.

        Only images go that nobody is expected to use, and no known image must find too little room for its pull
        for as long as all that is put away stays."""
        if self.budget_bytes is None:
            return ()
        most_bytes = self.budget_bytes - self._kept_bytes - num_bytes
        if any(most_bytes < self._least_bytes(name) <= self.budget_bytes for name in self._known):
            return None
        candidates = [v for v in self._present if self.may_go(v) and self._next_use(v) == math.inf]
        files = Image(name="", layers=(Layer(key="", pull_bytes=0, disk_bytes=num_bytes),))
        return self._evictions(candidates, files)

    def plan_trim(self) -> tuple[str, ...]:
        """What to evict now that the budget is exceeded by what was there before us."""
        return self._evictions([v for v in self._present if self.may_go(v)], None, best_effort=True) or ()

    def _least_bytes(self, name: str) -> int:
        """What is held while the image is pulled, everything that can ever go gone."""
        fixed = self._by_key(self._fixed & self._present.keys())
        return sum(layer.disk_bytes for layer in fixed.values()) + _peak_bytes(self._known[name].layers, fixed)

    def _evictions(
        self, candidates: list[str], image: Image | None, *, best_effort: bool = False
    ) -> tuple[str, ...] | None:
        kept = dict(self._present)
        pulled = self._by_key(self._pulling)
        victims: list[str] = []
        while not self._fits(kept, image):
            there = Counter(layer.key for v in kept for layer in self._layers(v))
            holders = there + Counter(layer.key for v in self._pulling for layer in self._layers(v))
            # A pull counts on the layers that were there when it began.
            free = [v for v in candidates if not any(there[x.key] == 1 and x.key in pulled for x in self._layers(v))]
            if not free:
                return tuple(victims) if best_effort else None
            victim = min(free, key=lambda v: self._rank(v, holders))
            candidates.remove(victim)
            del kept[victim]
            victims.append(victim)
        for victim in reversed(victims[:-1]):  # a big one may have made a dearer one needless
            if self._fits(kept | {victim: None}, image):
                kept[victim] = None
                victims.remove(victim)
        return tuple(victims)

    def _rank(self, name: str, holders: Counter[str]) -> tuple[int, float, float]:
        """Least first: what would be pulled again soonest for each byte freed goes last."""
        if name not in self._named:
            return 2, 0.0, 0.0  # `min` takes the first of equals: the least recently used
        alone = [layer for layer in self._layers(name) if holders[layer.key] == 1]
        freed_bytes = sum(layer.disk_bytes for layer in alone)
        if freed_bytes == 0:
            return 1, 1 / self._distance(name), 0.0
        loss = sum(layer.pull_bytes / self._layer_distance(layer) for layer in alone)
        return int(self._open[name] > 0), loss / freed_bytes, -freed_bytes

    def _layer_distance(self, layer: Layer) -> float:
        return min(self._distance(name) for name in self._users[layer.key])

    def _distance(self, name: str) -> float:
        return 1.0 + max(0.0, self._next_use(name) - self._position)  # samples may begin out of order

    def _next_use(self, name: str) -> float:
        if self._open[name]:
            return self._position
        positions = self._uses.get(name)
        return positions[0] if positions else math.inf

    def _fits(self, present: Iterable[str], image: Image | None) -> bool:
        if self.budget_bytes is None:
            return True
        return self._held(present, image) <= self.budget_bytes

    def _held(self, present: Iterable[str], image: Image | None = None) -> int:
        """Bytes with `present` on the node and, besides the pulls under way, one of `image`."""
        layers = self._by_key(present)
        pulls = [self._known[name] for name in self._pulling] + ([image] if image else [])
        packed_bytes = 0
        for pull in pulls:
            new = [layer for layer in pull.layers if layer.key not in layers]
            packed_bytes += _peak_bytes(new, {}) - sum(layer.disk_bytes for layer in new)
        for pull in pulls:
            layers |= {layer.key: layer for layer in pull.layers}
        return sum(layer.disk_bytes for layer in layers.values()) + packed_bytes + self._kept_bytes

    def _layers(self, name: str) -> tuple[Layer, ...]:
        return self._known[name].layers

    def _by_key(self, names: Iterable[str]) -> dict[str, Layer]:
        return {layer.key: layer for name in names for layer in self._layers(name)}

    def _touch(self, name: str) -> None:
        if name in self._present:
            del self._present[name]
            self._present[name] = None


def _peak_bytes(layers: Sequence[Layer], have: dict[str, Layer]) -> int:
    """The most that pulling `layers` takes at one time: an engine downloads in any order, unpacks
    from the bottom up, and drops a compressed layer once it is unpacked."""
    new = [layer for layer in layers if layer.key not in have]
    packed_bytes = sum(layer.pull_bytes for layer in new)
    unpacked_bytes = peak_bytes = 0
    for layer in new:
        unpacked_bytes += layer.disk_bytes
        peak_bytes = max(peak_bytes, unpacked_bytes + packed_bytes)
        packed_bytes -= layer.pull_bytes
    return peak_bytes
