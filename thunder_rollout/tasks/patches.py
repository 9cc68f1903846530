"""Git patches as text: made from two versions of files, and turned round."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

_HUNK = re.compile(r"@@ -(\S+) \+(\S+) @@(.*)", re.DOTALL)
_HEADERS = (
    ("--- a/", "+++ b/"),
    ("--- /dev/null", "+++ /dev/null"),
    ("new file mode ", "deleted file mode "),
    ("old mode ", "new mode "),
    ("rename from ", "rename to "),
)
_FLIPPED = {one: other for pair in _HEADERS for one, other in (pair, pair[::-1])}
_NO_NEWLINE = "\\ No newline at end of file\n"


class BadPatch(ValueError):
    """Not a git patch of text files."""


def make_patch(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """From `before` to `after` (relative path to text); both must have the same paths."""
    chunks = []
    for path in sorted(before):
        if before[path] != after[path]:
            lines = difflib.unified_diff(
                before[path].splitlines(keepends=True), after[path].splitlines(keepends=True), f"a/{path}", f"b/{path}"
            )
            chunks.append(f"diff --git a/{path} b/{path}\n")
            chunks += [line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}" for line in lines]
    return "".join(chunks)


def reverse_patch(patch: str) -> str:
    """The patch that undoes `patch`. Raises `BadPatch` for binary files, copies and nonsense."""
    result: list[str] = []
    headers: list[str] = []
    hunk: list[str] = []
    old = new = 0  # lines that the hunk still owes
    for line in patch.splitlines(keepends=True):
        if line.startswith("\\") and hunk:
            hunk.append(line)
        elif old > 0 or new > 0:
            old, new = old - (line[0] != "+"), new - (line[0] != "-")
            hunk.append(line)
        else:
            result += _flip_lines(hunk)
            hunk = []
            if places := _HUNK.match(line):
                result += _flip_headers(headers)
                headers = []
                old, new = _length(places[1]), _length(places[2])
                result.append(f"@@ -{places[2]} +{places[1]} @@{places[3]}")
                continue
            if line.startswith("diff --git "):
                result += _flip_headers(headers)
                headers = []
            headers.append(line)
    if not result and not hunk:
        raise BadPatch("it has no hunk")
    return "".join(result + _flip_lines(hunk) + _flip_headers(headers))


def _flip_lines(hunk: list[str]) -> list[str]:
    """What was added is removed, and what is removed stands first, as git has it."""
    result: list[str] = []
    removed: list[str] = []
    added: list[str] = []
    current = result
    for line in hunk:
        if line.startswith("+"):
            current = removed
            removed.append("-" + line[1:])
        elif line.startswith("-"):
            current = added
            added.append("+" + line[1:])
        elif line.startswith("\\"):
            current.append(line)
        else:
            result += [*removed, *added, line]
            removed, added = [], []
            current = result
    return result + removed + added


def _length(place: str) -> int:
    return int(place.partition(",")[2] or 1)


def _flip_headers(lines: list[str]) -> list[str]:
    """In git's order, which has the old side first."""
    flipped = [_flip_header(line) for line in lines]
    for first, second in (("--- ", "+++ "), ("old mode ", "new mode "), ("rename from ", "rename to ")):
        places = [i for i, line in enumerate(flipped) if line.startswith((first, second))]
        if len(places) == 2 and flipped[places[0]].startswith(second):
            flipped[places[0]], flipped[places[1]] = flipped[places[1]], flipped[places[0]]
    return flipped


def _flip_header(line: str) -> str:
    if line.startswith(("GIT binary patch", "Binary files", "copy ")):
        raise BadPatch(f"it has {line.strip()!r}")
    if line.startswith("index "):
        ids, _, mode = line[len("index ") :].rstrip("\n").partition(" ")
        before, _, after = ids.partition("..")
        return f"index {after}..{before}{' ' + mode if mode else ''}\n"
    if line.startswith("diff --git a/"):
        return line  # a rename's names are in its own headers
    for one, other in _FLIPPED.items():
        if line.startswith(one):
            return other + line[len(one) :]
    return line
