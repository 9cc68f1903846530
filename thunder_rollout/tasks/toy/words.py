"""Names that toy repositories are made of."""

from __future__ import annotations

PACKAGES = (
    "bakery", "bridge", "cabin", "canyon", "clinic", "dairy", "depot", "garage",
    "garden", "harbor", "kitchen", "ledger", "market", "meadow", "museum", "orchard",
    "quarry", "stable", "studio", "tavern", "temple", "theater", "tower", "valley",
)  # fmt: skip
MODULES = (
    "basics", "blocks", "bounds", "helpers", "layers", "limits", "measures", "pieces",
    "points", "ranges", "rules", "scores", "shapes", "shares", "stats", "steps",
    "tools", "totals", "units", "values",
)  # fmt: skip
VERBS = (
    "adjust", "apply", "build", "check", "choose", "combine", "derive", "find",
    "fold", "get", "make", "measure", "merge", "mix", "pack", "pick",
    "rate", "read", "scale", "settle", "shape", "shift", "tune", "weigh",
)  # fmt: skip
NOUNS = (
    "amount", "badge", "basket", "batch", "bonus", "charge", "circle", "corner",
    "credit", "grade", "label", "level", "margin", "offer", "order", "parcel",
    "plan", "prize", "quota", "record", "reward", "route", "signal", "stock",
    "ticket", "token", "tract", "volume", "wage", "weight",
)  # fmt: skip
NUMBER_NAMES = (
    "cost", "depth", "first", "gap", "height", "left", "price", "rank",
    "right", "score", "second", "size", "speed", "width",
)  # fmt: skip
LIST_NAMES = ("amounts", "entries", "grades", "marks", "numbers", "prices", "rows", "samples")
WORD_NAMES = ("brand", "city", "color", "name", "place", "tag", "text", "title")
TABLE_NAMES = ("catalog", "index", "lookup", "mapping", "prices", "registry", "scores", "table")
KEY_NAMES = ("code", "key", "label", "slot")
WORDS = (
    "amber", "apple", "birch", "cedar", "coral", "ember", "fern", "flint", "hazel", "iron",
    "ivory", "lemon", "maple", "Mint", "Olive", "Opal", "Pearl", "Rose", "Sage", "Stone",
)  # fmt: skip
