"""The advice about a reward service that is too slow can be followed."""

import pytest

from dar.protocol.reward_spec import MAX_CONCURRENCY, RewardLimits
from dar.training.report.capacity import advice


@pytest.mark.parametrize(
    ("concurrency", "needed", "said"),
    [
        (8, 20, "raise its limits.concurrency from 8 to at least 20"),
        (
            8,
            4012,
            "about 4012 requests at once would hide that, more than the 256 that are allowed",
        ),
        (256, 4012, "its limits.concurrency is 256, the most there is"),
    ],
)
def test_no_more_requests_at_once_are_advised_than_are_allowed(
    concurrency: int, needed: int, said: str
) -> None:
    assert said in advice(concurrency, needed)
    assert RewardLimits(concurrency=MAX_CONCURRENCY).concurrency == MAX_CONCURRENCY
