"""Arguments for toy functions, and how values are written in tests and statements."""

from __future__ import annotations

import random
from typing import Any

from thunder_rollout.tasks.toy import words

NAMES_BY_KIND = {
    "number": words.NUMBER_NAMES,
    "numbers": words.LIST_NAMES,
    "words": words.LIST_NAMES,
    "word": words.WORD_NAMES,
    "affix": words.KEY_NAMES,
    "key": words.KEY_NAMES,
    "table": words.TABLE_NAMES,
}


def draw_names(kinds: tuple[str, ...], rng: random.Random) -> list[str]:
    """A different parameter name for each kind."""
    names: list[str] = []
    for kind in kinds:
        names.append(rng.choice([name for name in NAMES_BY_KIND[kind] if name not in names]))
    return names


def draw_arguments(kinds: tuple[str, ...], rng: random.Random) -> tuple[Any, ...]:
    """One example call; an affix or key often belongs to the argument before it."""
    arguments: list[Any] = []
    for kind in kinds:
        arguments.append(_draw(kind, arguments[-1] if arguments else None, rng))
    return tuple(arguments)


def _draw(kind: str, before: Any, rng: random.Random) -> Any:
    match kind:
        case "number":
            if isinstance(before, list) and rng.random() < 0.7:
                return rng.choice(before)
            if isinstance(before, int) and rng.random() < 0.2:
                return before
            return rng.randrange(0, 13)
        case "numbers":
            return [rng.randrange(0, 10) for _ in range(rng.randrange(3, 6))]
        case "word":
            return rng.choice(words.WORDS)
        case "words":
            return rng.choices(words.WORDS, k=rng.randrange(2, 5))
        case "affix":
            cut = rng.randrange(1, 3)
            return rng.choice([before[:cut], before[-cut:]])
        case "table":
            keys = rng.sample(words.WORDS, rng.randrange(2, 4))
            return {key: rng.randrange(0, 10) for key in keys}
        case "key":
            return rng.choice([*before, rng.choice(words.WORDS)])
    raise ValueError(f"unknown kind of argument: {kind}")


def render(value: Any) -> str:
    """`value` as a Python literal with double quotes."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(render(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{render(key)}: {render(item)}" for key, item in value.items()) + "}"
    return repr(value)


def render_call(function: str, arguments: tuple[Any, ...]) -> str:
    return f"{function}({', '.join(render(argument) for argument in arguments)})"
