"""Git commands, for a shell inside a sandbox, that leave a repository with one commit.

Content, author and date are fixed, so the same tree always has the same commit id.
"""

from __future__ import annotations

_DATE = "1700000000 +0000"
# Independent of the machine's git configuration: branch name, hooks, templates, signing.
_GIT = (
    f'env GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_DATE="{_DATE}" GIT_COMMITTER_DATE="{_DATE}"'
    " git -c safe.directory='*' -c core.hooksPath=/dev/null -c core.autocrlf=false -c commit.gpgsign=false"
    ' -c user.name="Task Author" -c user.email=task@example.org'
)


def new_repository() -> str:
    """In the current folder, whatever is there: a repository of everything, ignored files too."""
    return (
        f"rm -rf .git && {_GIT} init -q -b main --template= --object-format=sha1 . && {_GIT} add -A -f"
        f' && {_GIT} commit -q --no-verify -m "Initial commit"'
    )


def one_commit() -> str:
    """In a repository: what is staged becomes a commit without a past, and HEAD."""
    return f'{_GIT} reset -q --soft $({_GIT} commit-tree -m "Initial commit" $({_GIT} write-tree))'
