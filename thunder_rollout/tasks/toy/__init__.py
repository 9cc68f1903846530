"""Toy bug-fix tasks, made here: nothing to download, hidden tests, known fixes."""

from thunder_rollout.tasks.toy.generator import DIFFICULTIES, TOY_IMAGE, generate

__all__ = ["DIFFICULTIES", "TOY_IMAGE", "generate"]
