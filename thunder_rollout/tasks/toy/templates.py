"""What toy functions look like, and how each can be wrong.

A template's body marks its mutation points: `«good|bad|bad»` holds the right text and then the
bugs that may stand in its place. `$a` and `$b` are parameters, `$k` and `$other` two different
small constants. `doc` says in words what the function returns; it is the specification the
agent reads, so it determines the right body.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Template

_POINT = re.compile(r"«([^»]*)»")


@dataclass(frozen=True, slots=True)
class FunctionTemplate:
    """`kinds` are the parameters' kinds, see `examples.draw_arguments`."""

    kinds: tuple[str, ...]
    doc: str
    body: tuple[str, ...]

    def fixed(self, names: dict[str, str]) -> list[str]:
        """The right body, line by line."""
        return [_fill(line, names) for line in self.body]

    def bugs(self, names: dict[str, str]) -> list[Bug]:
        """Every way to be wrong in exactly one place, in a stable order."""
        return [
            Bug(line=number, good=_fill(line, names), bad=bad)
            for number, line in enumerate(self.body)
            for bad in _wrong_lines(line, names)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """Line number `line` of a body (from 0) reads `bad` where it should read `good`."""

    line: int
    good: str
    bad: str


def _fill(line: str, names: dict[str, str]) -> str:
    return Template(_POINT.sub(lambda point: point[1].split("|")[0], line)).substitute(names)


def _wrong_lines(line: str, names: dict[str, str]) -> list[str]:
    good = _fill(line, names)
    pieces = _POINT.split(line)  # every second piece is the inside of a mutation point
    right = [piece.split("|")[0] if index % 2 else piece for index, piece in enumerate(pieces)]
    wrong = [
        Template("".join([*right[:index], bad, *right[index + 1 :]])).substitute(names)
        for index in range(1, len(pieces), 2)
        for bad in pieces[index].split("|")[1:]
    ]
    return [bad for bad in dict.fromkeys(wrong) if bad != good]


def _one(kinds: str, doc: str, expression: str) -> FunctionTemplate:
    return FunctionTemplate(tuple(kinds.split()), doc, (f"return {expression}",))


def _many(kinds: str, doc: str, *body: str) -> FunctionTemplate:
    return FunctionTemplate(tuple(kinds.split()), doc, body)


ONE_LINE = (
    _one("number number", "$a plus $b, times $k", "($a «+|-|*» $b) «*|+» «$k|$other»"),
    _one("number number", "$a minus $b", "«$a - $b|$b - $a|$a + $b»"),
    _one("number number", "$a times $b, plus $k", "$a «*|+|-» $b «+|-» «$k|$other»"),
    _one("number number", "$k times $a, minus $b", "«$k|$other» «*|+» $a «-|+» $b"),
    _one("number", "$a minus $k", "$a «-|+|*» «$k|$other»"),
    _one("number number", "the larger of $a and $b", "«max|min»($a, $b)"),
    _one("number number", "the smaller of $a and $b", "«min|max»($a, $b)"),
    _one("number", "$a, but at most $k", "«min|max»($a, «$k|$other»)"),
    _one("number", "$a, but at least $k", "«max|min»($a, «$k|$other»)"),
    _one("number", "the remainder of $a divided by $k", "$a «%|//|-» «$k|$other»"),
    _one("number", "how many times $k fits in $a", "$a «//|%|-» «$k|$other»"),
    _one("number number", "whether $a is more than $b", "$a «>|<|>=» $b"),
    _one("number number", "whether $a is less than $b", "$a «<|>|<=» $b"),
    _one("number", "whether $a is at least $k", "$a «>=|>|<=» «$k|$other»"),
    _one("number", "whether $a is even", "$a % 2 «==|!=» 0"),
    _one("number", "whether $a is odd", "$a % 2 «==|!=» 1"),
    _one("number", "the square of $a", "$a «*|+|-» $a"),
    _one("number number", "the distance between $a and $b", "«abs($a - $b)|$a - $b|abs($a + $b)»"),
    _one("numbers", "the sum of $a", "«sum|max|len»($a)"),
    _one("numbers", "the largest item of $a", "«max|min|sum»($a)"),
    _one("numbers", "the number of items of $a", "«len|sum|max»($a)"),
    _one("numbers", "the last item of $a", "$a[«-1|0|1»]"),
    _one("numbers", "the first item of $a", "$a[«0|1|-1»]"),
    _one("numbers", "$a without its first item", "$a[«1:|:-1|2:»]"),
    _one("numbers", "$a without its last item", "$a[«:-1|1:|:-2»]"),
    _one("numbers", "$a in reverse order", "$a[::«-1|2|1»]"),
    _one("numbers", "$a from small to large", "sorted(«$a|$a, reverse=True»)"),
    _one("numbers", "the items of $a above $k", "[item for item in $a if item «>|<|>=» «$k|$other»]"),
    _one("numbers", "every item of $a times $k", "[item «*|+|-» «$k|$other» for item in $a]"),
    _one("numbers", "every item of $a plus $k", "[item «+|-|*» «$k|$other» for item in $a]"),
    _one("word", "$a in upper case", "$a.«upper|lower|title»()"),
    _one("word", "$a in lower case", "$a.«lower|upper|title»()"),
    _one("word", "the first letter of $a", "$a[«0|1|-1»]"),
    _one("word", "the last letter of $a", "$a[«-1|0|1»]"),
    _one("word", "$a backwards", "$a[::«-1|1|2»]"),
    _one("word", "$a repeated $k times", "$a * «$k|$other»"),
    _one("word", "the length of $a plus $k", "len($a) «+|-|*» «$k|$other»"),
    _one("word word", "$a and $b joined by a dash", '«$a + "-" + $b|$b + "-" + $a|$a + $b»'),
    _one("word affix", "whether $a starts with $b", "$a.«startswith|endswith»($b)"),
    _one("word affix", "whether $a ends with $b", "$a.«endswith|startswith»($b)"),
    _one("table key", "the value of $b in $a, or $k if missing", "$a.get($b, «$k|$other|0»)"),
    _one("table key", "whether $b is in $a", "$b «in|not in» $a"),
    _one("table", "the sum of the values of $a", "sum($a.«values|keys»())"),
    _one("table", "the keys of $a in order", "sorted($a.«keys|values»())"),
)

SHORT_LOOPS = (
    _many(
        "numbers",
        "the sum of the items of $a above $k",
        "total = «0|1»",
        "for item in $a:",
        "    if item «>|<|>=» «$k|$other»:",
        "        total «+=|-=|=» item",
        "return «total|item»",
    ),
    _many(
        "numbers",
        "how many items of $a are at least $k",
        "count = «0|1»",
        "for item in $a:",
        "    if item «>=|>|<=» «$k|$other»:",
        "        count += «1|2|item»",
        "«return count|return item|count»",
    ),
    _many(
        "words",
        "the longest word of $a, the first one of several",
        'best = ""',
        "for word in $a:",
        "    if len(word) «>|<|>=» len(best):",
        "        best = «word|best»",
        "return «best|word»",
    ),
    _many(
        "number number",
        "$a limited to the range from 0 to $b",
        "if $a «<|>|>=» 0:",
        "    return «0|1|$b»",
        "if $a «>|<» $b:",
        "    return «$b|$a|0»",
        "return «$a|$b|0»",
    ),
    _many(
        "words",
        "a dict from each word of $a to how often it occurs",
        "counts = {}",
        "for word in $a:",
        "    counts[word] = counts.get(word, «0|1|$k») «+|-» «1|2»",
        "«return counts|return word|counts»",
    ),
    _many(
        "table number",
        "the keys of $a whose value is above $b, in order",
        "chosen = []",
        "for key, value in $a.items():",
        "    if value «>|<|>=» $b:",
        "        chosen.append(«key|value»)",
        "return «sorted(chosen)|chosen|sorted(chosen, reverse=True)»",
    ),
    _many(
        "numbers",
        "the running sums of $a",
        "total = «0|1|$k»",
        "sums = []",
        "for item in $a:",
        "    total «+=|-=|=» item",
        "    sums.append(«total|item|sums»)",
        "return «sums|total»",
    ),
    _many(
        "numbers number",
        "the position of $b in $a, or -1 if missing",
        "for index, item in enumerate($a):",
        "    if item «==|!=|>=» $b:",
        "        return «index|item|index + 1»",
        "return «-1|0|1»",
    ),
)
