"""The script that leaves a repository with nothing but its base commit and what led to it.

The git folder is made anew from an allow list: one branch, the tags that lie in the base commit's past
(versions are read from them), the objects reachable from it, and submodules. So whatever else might
hold the answer is gone: later commits, other branches, remotes, reflogs, stashes, notes,
configuration, alternates, and objects that nothing refers to, packed or loose.

Files of the work tree stay as they are. Where they are not the base commit's (an image may come with
changes of its own, committed or not), they are one commit on top of it, the same in every sandbox of
the image: what an agent changes is what differs from HEAD.

Packs are rewritten only if they hold an object that has to go; otherwise the cost is that of
listing the base commit's objects and reading the work tree once.
"""

from __future__ import annotations

# $1 = base commit. It ends with an error, and the repository unchanged, where there is none.
SCRUB_SCRIPT = """
set -eu
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_COUNT=1 LC_ALL=C GIT_NO_REPLACE_OBJECTS=1
export GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
top=$(git rev-parse --show-toplevel)
cd "$top"
base=$(git rev-parse -q --verify "$1^{commit}")
own=$(git rev-parse --absolute-git-dir)
common=$(cd "$(git rev-parse --git-common-dir)" && pwd -P)
new=$(mktemp -d "$top/.git-scrubbed.XXXXXX")
trap 'rm -rf "$new"' EXIT
git init -q --bare --template= "$new"
config=$(<"$new/config")
echo "${config/bare = true/bare = false}" > "$new/config"
echo 'ref: refs/heads/main' > "$new/HEAD"
git for-each-ref --merged="$base" --format='%(refname) %(objectname)' refs/tags > "$new/tags"
{ echo "$base"; while read -r _ object; do echo "$object"; done < "$new/tags"; } \\
    | git rev-list --objects --no-object-names --stdin | sort -u > "$new/keep"
git cat-file --batch-all-objects --batch-check='%(objectname)' | sort -u > "$new/all"
[ ! -f "$common/shallow" ] || cp "$common/shallow" "$new/shallow"
if [ ! -f "$common/objects/info/alternates" ] && cmp -s "$new/keep" "$new/all"; then
    rm -rf "$new/objects" "$common/objects/info"
    mv "$common/objects" "$new/objects"
else
    [ -d "$new/objects/pack" ] || mkdir "$new/objects/pack"
    git pack-objects -q --threads=1 --window=0 --delta-base-offset "$new/objects/pack/pack" < "$new/keep" >/dev/null
    if [ -f "$common/objects/info/alternates" ]; then
        (cd "$common/objects" && grep -v '^#' info/alternates | while IFS= read -r other; do rm -rf -- "$other"; done)
    fi
fi
mkdir -p "$new/objects/info"
[ ! -d "$common/modules" ] || mv "$common/modules" "$new/modules"
rm -rf "$own" "$common" "$top/.git" "$new/all" "$new/keep"
mv "$new" "$top/.git"
trap - EXIT
{ echo "refs/heads/main $base"; cat .git/tags; } | while read -r ref; do echo "create $ref"; done \\
    | git update-ref --stdin
git read-tree "$base"
git add -A . 2>/dev/null
if ! git diff-index --cached --quiet "$base" --; then
    export GIT_AUTHOR_NAME=image GIT_AUTHOR_EMAIL=image@localhost GIT_AUTHOR_DATE="$(git log -1 --format=%cI "$base")"
    export GIT_COMMITTER_NAME=image GIT_COMMITTER_EMAIL=image@localhost GIT_COMMITTER_DATE="$GIT_AUTHOR_DATE"
    git update-ref refs/heads/main "$(git commit-tree "$(git write-tree)" -p "$base" -m "What the image changed")"
fi
rm -rf .git/logs .git/tags
"""
