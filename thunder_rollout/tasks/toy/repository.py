"""A toy repository's git identity, computed without git.

The commit that `SETUP` makes in a sandbox has the id that `commit_id` gives: content, author
and date are fixed, so a task knows its `base_commit` before any sandbox exists.
"""

from __future__ import annotations

import hashlib

_AUTHOR = "Toy Author <toy@example.org>"
_EPOCH_S = 1_700_000_000
_MESSAGE = "Initial commit"

# Independent of the machine's git configuration: branch name, hooks, templates, signing.
SETUP = (
    "cd {workdir} && export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1"
    f' GIT_AUTHOR_DATE="{_EPOCH_S} +0000" GIT_COMMITTER_DATE="{_EPOCH_S} +0000"'
    " && find . -type f -exec chmod 644 {{}} +"
    " && git init -q -b main --template= --object-format=sha1 ."
    " && git -c core.autocrlf=false add -A"
    ' && git -c user.name="Toy Author" -c user.email=toy@example.org -c commit.gpgsign=false -c maintenance.auto=false'
    f' commit -q --no-verify -m "{_MESSAGE}"'
)


def commit_id(files: dict[str, bytes]) -> str:
    """The id of the one commit holding `files` (relative path to content), none executable."""
    tree = _tree_id(files)
    stamp = f"{_AUTHOR} {_EPOCH_S} +0000"
    text = f"tree {tree.hex()}\nauthor {stamp}\ncommitter {stamp}\n\n{_MESSAGE}\n"
    return _object_id("commit", text.encode()).hex()


def _tree_id(files: dict[str, bytes]) -> bytes:
    folders: dict[str, dict[str, bytes]] = {}
    entries: list[tuple[bytes, bytes]] = []
    for path, content in files.items():
        head, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(head, {})[rest] = content
        else:
            entries.append((head.encode(), b"100644 " + head.encode() + b"\0" + _object_id("blob", content)))
    for name, inside in folders.items():
        # git sorts a folder as if its name ended in a slash
        entries.append((name.encode() + b"/", b"40000 " + name.encode() + b"\0" + _tree_id(inside)))
    return _object_id("tree", b"".join(entry for _, entry in sorted(entries)))


def _object_id(kind: str, content: bytes) -> bytes:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).digest()
