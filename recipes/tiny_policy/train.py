"""Build the tiny policy once and print where it is (the last line).

usage: python recipes/tiny_policy/train.py [--config FILE] [--keep-current] [--print-path | --evaluate N]
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from settings import CONFIG_PATH, load_settings

import thunder_rollout
from thunder_rollout.errors import UserError

_RECIPE_SOURCES = ("settings.py", "tokenizer.py", "transcripts.py", "training.py")
_PACKAGE_SOURCES = (
    "agent/actions.py",
    "agent/chat.py",
    "agent/config.py",
    "tasks/toy/examples.py",
    "tasks/toy/expert.py",
    "tasks/toy/generator.py",
    "tasks/toy/problem.py",
    "tasks/toy/templates.py",
    "tasks/toy/words.py",
)


def policy_folder(config: Path) -> Path:
    """Where the policy of this configuration and this code belongs, built or not."""
    home = Path(os.environ.get("THUNDER_HOME") or Path.home() / ".cache" / "thunder_rollout")
    return home / "tiny_policy" / _content_hash(config)


def ensure_policy(config: Path, *, keep_current: bool = False) -> Path:
    """The policy's folder, trained if it isn't there yet; a killed training leaves none. `current` points at it
    unless it is to be kept."""
    folder = policy_folder(config)
    settings = load_settings(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder.parent / ".lock"):
        if not folder.exists():
            _build(folder, settings)
        if not keep_current:
            _point_current_at(folder)
    return folder


def _build(folder: Path, settings: object) -> None:
    from training import build_policy  # torch and transformers take seconds to import

    building = folder.with_name(".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    build_policy(settings, building, log=lambda line: print(f"tiny_policy: {line}", flush=True))  # type: ignore[arg-type]
    building.rename(folder)


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Two trainings at once would share the folder they build in; the second waits."""
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _point_current_at(folder: Path) -> None:
    link = folder.with_name(".current")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.with_name("current"))


def _content_hash(config: Path) -> str:
    recipe, package = Path(__file__).parent, Path(thunder_rollout.__file__).parent
    sources = [*(recipe / name for name in _RECIPE_SOURCES), *(package / name for name in _PACKAGE_SOURCES)]
    digest = hashlib.sha256()
    for path in [config, *sources]:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Build the tiny policy once and print where it is.")
    parser.add_argument("--config", type=Path, default=CONFIG_PATH, help="another config.yaml")
    parser.add_argument("--keep-current", action="store_true", help="leave the link `current` as it is")
    parser.add_argument("--print-path", action="store_true", help="only say where it belongs; builds nothing")
    parser.add_argument("--evaluate", type=int, metavar="N", help="then let it act on N unseen tasks")
    parser.add_argument("--temperature", type=float, default=0.0, help="of --evaluate; 0 is greedy")
    options = parser.parse_args(arguments)
    try:
        if options.print_path:
            folder = policy_folder(options.config)
        else:
            folder = ensure_policy(options.config, keep_current=options.keep_current)
            if options.evaluate:
                from evaluate import evaluate

                difficulty = load_settings(options.config).difficulty
                print(evaluate(folder, options.evaluate, options.temperature, difficulty))
    except FileNotFoundError as error:
        print(f"--config: {error.filename} isn't there; give a file like the recipe's config.yaml", file=sys.stderr)
        return 2
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
