"""The script that takes a work tree's diff inside a sandbox, whatever the agent did to git there.

It runs on a throw-away git folder that only borrows the repository's objects. So the agent's
index, configuration, hooks, filters, external diff tools and `info/` files neither matter nor
change, and the diff works while the sandbox's disk is full (the folder is in `SCRATCH`, which is emptied
for it). Files that the tree's own `.gitignore` excludes are not in the diff, nor is what lies in a repository
within it.
"""

from __future__ import annotations

SCRATCH = "/run/thunder"
NO_REPOSITORY = 64
NO_BASE = 65
_WITHOUT_COMMIT = "does not have a commit checked out"  # git's word on a repository within; it has no content then

# $1 = base commit. Exits NO_REPOSITORY or NO_BASE where there is nothing to compare with.
DIFF_SCRIPT = f"""
set -eu
base=$1
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_COUNT=1 LC_ALL=C
export GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
objects=$(git rev-parse --git-path objects 2>/dev/null) && [ -d "$objects" ] || exit {NO_REPOSITORY}
objects=$(cd "$objects" && pwd -P)
top=$(git rev-parse --show-toplevel)
[ -d {SCRATCH} ] || mkdir -p {SCRATCH}
rm -rf {SCRATCH}/* {SCRATCH}/.[!.]*
scratch=$(mktemp -d {SCRATCH}/diff.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
git init -q --bare --template= "$scratch/git"
export GIT_DIR="$scratch/git" GIT_WORK_TREE="$top" GIT_ALTERNATE_OBJECT_DIRECTORIES="$objects"
git config core.bare false
git config core.fileMode true
git config core.preloadIndex false
git rev-parse -q --verify "$base^{{commit}}" >/dev/null || exit {NO_BASE}
cd "$top"
git read-tree "$base"
if ! git add -A --ignore-errors . 2> "$scratch/errors"; then
    grep -q {_WITHOUT_COMMIT!r} "$scratch/errors"
    if grep -v {_WITHOUT_COMMIT!r} "$scratch/errors" | grep -qE '^(error|fatal):'; then exit 1; fi
fi
git -c core.quotePath=true diff --cached --binary --full-index --no-renames \\
    --no-color --no-ext-diff --no-textconv --src-prefix=a/ --dst-prefix=b/ "$base"
"""
