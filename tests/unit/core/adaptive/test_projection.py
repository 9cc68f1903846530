"""What a backend is expected to hold counts shared tokens once, and growth for whoever grows."""

import pytest

from thunder_rollout.core.policies.adaptive.accounts import BackendAccount, ProgramAccount
from thunder_rollout.core.policies.adaptive.growth import Growth
from thunder_rollout.core.policies.adaptive.prefill_model import PrefillModel, ServiceClock
from thunder_rollout.core.policies.adaptive.projection import Projection

SHARED, OWN = 1000, 100
CONTEXT = SHARED + OWN
GROWTH = 2000  # half of the capacity, and so one of the projection's points


def backend() -> BackendAccount:
    return BackendAccount(
        name="e", generation=0, capacity_tokens=2 * GROWTH, offload_tokens=0, releases=False, max_running=64,
        model=PrefillModel(prior_token_s=1e-4, prior_load_token_s=1e-5, forgetting=1.0), clock=ServiceClock(),
    )  # fmt: skip


def peak_tokens(growth: Growth, num_there: int, *, unique_tokens: int, added: int) -> float:
    """Of `num_there` programs of 1,100 tokens and another that joins them."""
    account = backend()
    projection = Projection(growth, {"e": account})
    projection.size(account)
    for _ in range(num_there):
        projection.follow(ProgramAccount(context_tokens=CONTEXT), "e")
    return projection.peak_tokens(
        ProgramAccount(context_tokens=CONTEXT), CONTEXT, account, unique_tokens=unique_tokens, added=added
    )


def growing() -> Growth:
    growth = Growth(prior_growth=0.0)
    growth.reach(None, CONTEXT + GROWTH)
    return growth


def test_programs_that_share_nothing_need_what_each_of_them_does():
    assert peak_tokens(growing(), 7, unique_tokens=7 * CONTEXT, added=CONTEXT) == pytest.approx(8 * (CONTEXT + GROWTH))


def test_a_shared_prompt_counts_once_and_the_growth_of_each_whole():
    unique_tokens = SHARED + 7 * OWN
    assert peak_tokens(growing(), 7, unique_tokens=unique_tokens, added=OWN) == pytest.approx(
        SHARED + 8 * (OWN + GROWTH)
    )


def test_who_has_left_shares_nothing_any_more():
    growth = Growth(prior_growth=0.0)
    for _ in range(200):  # half of them end where they are, a turn later
        growth.add_end(None, CONTEXT + 1)
        growth.add_end(None, CONTEXT + GROWTH + 1)
    unique_tokens = SHARED + 7 * OWN
    shared_each = 6 * SHARED / 7
    expected = 4 * (CONTEXT + GROWTH) - 3.5 * shared_each - 0.5 * SHARED
    assert peak_tokens(growth, 7, unique_tokens=unique_tokens, added=OWN) == pytest.approx(expected)
