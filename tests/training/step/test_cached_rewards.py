"""Training with remembered rewards: the same numbers, and fewer requests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.rewards.cache.store import FILE
from fakes import reward_chaos as chaos
from fakes.reward_server import ScoreRequest

SHORT = {"max_steps": 2, "max_new_tokens": 1}
"""So short that many completions are equal."""


def seen_by_service(request: ScoreRequest, sample: dict[str, Any]) -> tuple[Any, ...]:
    names = ("prompt", "completion", "finish_reason", "completion_tokens", "ground_truth")
    return request.content["step"], *(sample[name] for name in names)


@pytest.mark.parametrize("overlap", ["none", "one_step"])
def test_a_run_with_remembered_rewards_gives_the_bits_of_one_without(
    run: Callable[..., Any], overlap: str
) -> None:
    outcomes, asked = [], []
    for cache in ({"enabled": False}, {"enabled": True}):
        with chaos.service() as service:
            rewards = chaos.rewards_of(service.url, component={"cache": cache})
            outcomes.append(run(reward_funcs=rewards, overlap=overlap, **SHORT))
            asked.append([seen_by_service(r, s) for r in service.requests for s in r.samples])
    plain, first = outcomes
    chaos.assert_same(plain, first)
    folder = Path(first[0].args.output_dir) / "reward-cache"
    assert (folder / FILE).exists()
    assert {facts[1:] for facts in asked[1]} == {facts[1:] for facts in asked[0]}
    assert len(set(asked[1])) == len(asked[1]) < len(asked[0]), "each once in a step"
    assert all("reward_requests/hash/cached" not in report for report in plain[1].reports.values())


def test_a_second_run_asks_for_nothing_that_the_first_was_told(run: Callable[..., Any]) -> None:
    with chaos.service() as service:
        rewards = chaos.rewards_of(service.url, component={"cache": {"enabled": True}})
        first = run(reward_funcs=rewards, **SHORT)
        asked = len(service.requests)
        second = run(reward_funcs=rewards, **SHORT)
        assert len(service.requests) == asked > 0
    chaos.assert_same(first, second)
    hits = [report["reward_requests/hash/cache_hits"] for report in second[1].reports.values()]
    assert hits == [48, 48]
    shown = [
        {step: [row.model_dump() for row in rows] for step, rows in sink.shown.items()}
        for _, sink in (first, second)
    ]
    assert shown[0] == shown[1]
