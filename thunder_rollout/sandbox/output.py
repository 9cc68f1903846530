"""What a command printed, kept within a bound.

Invariant: an `OutputBuffer` never holds more than its limit and one chunk, whatever is fed; it
keeps the first and the last half of the limit and counts what it cut between them.
"""

from __future__ import annotations


class OutputBuffer:
    def __init__(self, limit_bytes: int) -> None:
        self._head_limit = (limit_bytes + 1) // 2
        self._tail_limit = limit_bytes - self._head_limit
        self._head = bytearray()
        self._tail = bytearray()
        self.cut_bytes = 0

    def feed(self, chunk: bytes) -> None:
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += chunk[:room]
            chunk = chunk[room:]
        self._tail += chunk
        excess = len(self._tail) - self._tail_limit
        if excess > 0:
            del self._tail[:excess]
            self.cut_bytes += excess

    def content(self) -> bytes:
        """Everything kept; all that was fed exactly when `cut_bytes` is 0."""
        return bytes(self._head + self._tail)

    def text(self) -> str:
        """For people and models: undecodable bytes replaced, the cut marked in the middle."""
        if not self.cut_bytes:
            return self.content().decode("utf-8", "replace")
        head = self._head.decode("utf-8", "replace")
        tail = self._tail.decode("utf-8", "replace")
        return f"{head}\n... [{self.cut_bytes} bytes cut] ...\n{tail}"


def truncate_middle(text: str, limit_bytes: int) -> str:
    """`text` as an `OutputBuffer` of this limit would show it."""
    buffer = OutputBuffer(limit_bytes)
    buffer.feed(text.encode("utf-8", "replace"))
    return buffer.text()
