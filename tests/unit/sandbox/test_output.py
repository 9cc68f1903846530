from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from thunder_rollout.sandbox.output import OutputBuffer, truncate_middle


@given(st.lists(st.binary(max_size=40)), st.integers(min_value=0, max_value=60))
def test_it_keeps_head_and_tail_and_counts_the_rest(chunks: list[bytes], limit_bytes: int) -> None:
    buffer = OutputBuffer(limit_bytes)
    for chunk in chunks:
        buffer.feed(chunk)
    everything, kept = b"".join(chunks), buffer.content()
    assert len(kept) + buffer.cut_bytes == len(everything)
    assert len(kept) == min(len(everything), limit_bytes)
    head = (limit_bytes + 1) // 2
    assert kept[:head] == everything[:head]
    if buffer.cut_bytes:
        assert kept[head:] == everything[len(everything) - limit_bytes // 2 :]


def test_what_fits_is_untouched() -> None:
    assert truncate_middle("naïve", 6) == "naïve"


def test_a_cut_is_marked_and_may_split_a_character() -> None:
    assert truncate_middle("éabcdefgé", 6) == "éa\n... [5 bytes cut] ...\ngé"
    assert truncate_middle("aéaaaaaaaa", 4) == "a\ufffd\n... [7 bytes cut] ...\naa"
