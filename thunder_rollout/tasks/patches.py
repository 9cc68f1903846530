"""Git patches as text: made from two versions of files, turned round, and asked what they touch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

_HUNK = re.compile(r"@@ -(\S+) \+(\S+) @@(.*)", re.DOTALL)
_HEADERS = (
    ("--- a/", "+++ b/"),
    ("--- /dev/null", "+++ /dev/null"),
    ("new file mode ", "deleted file mode "),
    ("old mode ", "new mode "),
    ("rename from ", "rename to "),
)
_FLIPPED = {one: other for pair in _HEADERS for one, other in (pair, pair[::-1])}
_MOVED = ("rename from ", "rename old ", "rename to ", "rename new ", "copy from ", "copy to ")
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)")
_ESCAPED = {b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
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


def patched_paths(patch: str) -> list[str]:
    """The files that a git patch writes, moves or removes: text, binary or neither (a mode, a rename)."""
    return _distinct([*_after("--- a/", _headers(patch)), *written_paths(patch), *moved_paths(patch), *_named(patch)])


def written_paths(patch: str) -> list[str]:
    """Those of them that are there afterwards, but for binary files and changes of nothing but a mode."""
    return _distinct(
        [path for header in ("+++ b/", "rename to ", "copy to ") for path in _after(header, _headers(patch))]
    )


def moved_paths(patch: str) -> list[str]:
    """Both ends of renames and copies. Complete whatever else a patch holds: no line of a hunk begins so."""
    return _distinct([path for header in _MOVED for path in _after(header, patch.split("\n"))])


def _distinct(paths: list[str]) -> list[str]:
    return list(dict.fromkeys(paths))


def _after(header: str, lines: Iterable[str]) -> Iterator[str]:
    begin, space, side = header.rpartition(" ")
    quoted = f'{begin}{space}"{side}'
    for line in lines:
        if line.startswith(quoted):
            yield _unquoted(line[len(quoted) :].rpartition('"')[0])
        elif line.startswith(header):
            yield line[len(header) :].split("\t")[0]


def _named(patch: str) -> Iterator[str]:
    """By the first line of an entry, where both sides have the same name."""
    for line in _headers(patch):
        if line.startswith("diff --git a/"):
            names = line[len("diff --git a/") :]
            path = names[: (len(names) - len(" b/")) // 2]
            if names == f"{path} b/{path}":
                yield path
        elif line.startswith('diff --git "a/'):
            yield _unquoted(line[len('diff --git "a/') :].partition('" ')[0])


def _headers(patch: str) -> Iterator[str]:
    """Every line that is not in a hunk."""
    old = new = 0
    for line in patch.split("\n"):
        if (old > 0 or new > 0) and not line.startswith("\\"):
            old, new = old - (line[:1] != "+"), new - (line[:1] != "-")
        elif places := _HUNK.match(line):
            old, new = _length(places[1]), _length(places[2])
        else:
            yield line


def _unquoted(path: str) -> str:
    """As git quotes names with special characters, without the quotes."""

    def letter(escape: re.Match[bytes]) -> bytes:
        code = escape[1]
        return bytes([int(code, 8) & 255]) if len(code) == 3 else _ESCAPED.get(code, code)

    return _ESCAPE.sub(letter, path.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


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
