"""Every numbered departure of `dar.training.loss`: its formula, and what it does to training."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from dar.errors import TrainingError
from dar.training import DARTrainer
from dar.training.loss import (
    control_variates,
    effective_sample_size,
    flattening_power,
    importance_weights,
    normalized_advantages,
    self_normalized,
    tied,
)
from fakes.recording_sink import RecordingSink

FEW = settings(max_examples=25, derandomize=True, deadline=None)
MODES = st.sampled_from(["none", "per_prompt", "batch"])
BASELINES = st.sampled_from(["mean", "leave_one_out"])
REWARDS = arrays("float64", (3, 4), elements=st.integers(-8, 8).map(lambda n: n / 4))
MASKS = arrays("bool", (3, 4))
LOGPS = arrays("float64", (3, 4), elements=st.floats(-60, -1))
STRENGTHS = {"alpha": 0.1, "beta": 0.3}
ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [10, 20], "completion_ids": [[4, 5, 3], [6, 7, 8, 3], [9, 3], [33, 3]],
     "rewards": [1.0, 0.25, 0.0, 0.5], "behavior_logps": [-11.0, -17.5, -8.0, -7.0]},
    {"prompt_ids": [11], "completion_ids": [[12, 13, 3], [6, 3], [40, 41, 42, 3]],
     "rewards": [0.5, 0.5, 0.5], "behavior_logps": [-12.0, -9.5, -16.0]},
    {"prompt_ids": [14], "completion_ids": [[15, 3], [16, 17, 3]],
     "rewards": [0.7501, 0.75], "behavior_logps": [-8.5, -12.5]},
]  # fmt: skip
"""Three groups of unequal size: one with a signal, one whose rewards are equal, and one
where they nearly are."""


def of(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


@pytest.fixture
def weigh(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink]
) -> Callable[..., list[Any]]:
    """What one step of offline training made of each completion, in the order of the rows."""

    def run(rows: Sequence[dict[str, Any]] = ROWS, model: Any = None, **options: Any) -> list[Any]:
        sink = new_sink()
        options = {"preset": "reference", "adv_norm": "none", "alpha": 0.1, "beta": 0.3} | options
        options |= {"max_steps": 1, "per_device_train_batch_size": len(rows), "allow_missing": True}
        train(model=model, train_dataset=rows, reward_funcs=None, sink=sink, settings=options)
        shown = {(row.prompt, row.completion): row for row in sink.shown[1]}
        assert len(shown) == sum(len(row["rewards"]) for row in rows)
        return [
            shown[" ".join(f"w{i}" for i in row["prompt_ids"]), words(ids)]
            for row in rows
            for ids in row["completion_ids"]
        ]

    return run


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in ids if token != 3)


def by_hand(row: Any, advantage: float, *, clip: float = 50.0, per_token: bool = False) -> float:
    log_ratio = (row.logp_ref - row.logp_behavior) / (row.completion_tokens if per_token else 1)
    return min(clip, math.exp(0.25 * log_ratio + advantage / 0.4))


# --- 1: leave-one-out baseline --------------------------------------------------------------------


@FEW
@given(rewards=REWARDS, mask=MASKS)
def test_1_the_baseline_is_the_mean_of_the_scored_siblings(rewards: Any, mask: Any) -> None:
    advantages_PK = normalized_advantages(
        of(rewards), mode="none", baseline="leave_one_out", valid=torch.as_tensor(mask)
    )
    for prompt in range(3):
        scored = [k for k in range(4) if mask[prompt][k]]
        for k in range(4):
            siblings = [rewards[prompt][other] for other in scored if other != k]
            is_compared = mask[prompt][k] and siblings
            expected = rewards[prompt][k] - sum(siblings) / len(siblings) if is_compared else 0.0
            assert advantages_PK[prompt, k].item() == pytest.approx(expected, abs=1e-12)


def test_1_training_compares_with_the_siblings_of_each_completion(
    weigh: Callable[..., list[Any]],
) -> None:
    plain, left_out = weigh(), weigh(baseline="leave_one_out")
    for number, (mean, row) in enumerate(zip(plain, left_out, strict=True)):
        count = 4 if number < 4 else 3 if number < 7 else 2
        assert row.advantage == pytest.approx(mean.advantage * count / (count - 1), abs=1e-6)
        assert row.weight == pytest.approx(by_hand(row, row.advantage), rel=1e-5)


# --- 2: missing rewards ---------------------------------------------------------------------------


@FEW
@given(rewards=REWARDS, mask=MASKS, mode=MODES, baseline=BASELINES, junk=st.floats())
def test_2_what_stands_at_a_missing_reward_never_counts(
    rewards: Any, mask: Any, mode: Any, baseline: Any, junk: float
) -> None:
    valid_PK = torch.as_tensor(mask)
    options = {"mode": mode, "baseline": baseline, "valid": valid_PK}
    soiled_PK = of(rewards).masked_fill(~valid_PK, junk)
    clean_PK = normalized_advantages(of(rewards), **options)
    assert torch.equal(normalized_advantages(soiled_PK, **options), clean_PK)
    assert not clean_PK[~valid_PK].any()


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf, None])
def test_2_a_reward_that_is_no_number_leaves_out_its_completion_and_nothing_else(
    train: Callable[..., DARTrainer], sink: RecordingSink, missing: float | None
) -> None:
    def score(completions: list[str], **columns: Any) -> list[float | None]:
        return [missing if i == 1 else float(i % 4) for i in range(len(completions))]

    trainer = train(reward_funcs=score, sink=sink, settings={"max_steps": 1, "baseline": "mean"})
    advantages = [row.advantage for row in sink.shown[1]]
    assert advantages[:4] == pytest.approx([-5 / 3, None, 1 / 3, 4 / 3])
    assert advantages[4:] == pytest.approx([-1.5, -0.5, 0.5, 1.5] * 2)
    assert sink.reports[1]["rewards/missing_fraction"] == pytest.approx(1 / 12)
    assert sink.reports[1]["dar/rewards_mean"] == pytest.approx((5 + 6 + 6) / 11)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_2_where_none_may_be_missing_one_ends_training_before_anything_changes(
    train: Callable[..., DARTrainer], make_model: Callable[..., Any], preset: str
) -> None:
    def score(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if i == 1 else float(i) for i in range(len(completions))]

    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingError, match="1 of the 12 completions of step 1") as caught:
        train(model=model, reward_funcs=score, settings={"preset": preset})
    assert caught.value.error_code == "missing_reward"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- 3: log-ratio per token -----------------------------------------------------------------------


@FEW
@given(
    per_token=st.floats(-0.5, 0.5), lengths=st.lists(st.integers(1, 500), min_size=2, max_size=5)
)
def test_3_the_same_log_ratio_per_token_gives_the_same_weight_at_any_length(
    per_token: float, lengths: list[int]
) -> None:
    lengths_B = torch.tensor(lengths)
    weights_B = importance_weights(
        torch.zeros(len(lengths)),
        per_token * of(lengths),
        torch.zeros(len(lengths)),
        **STRENGTHS,
        clip=20,
        lengths=lengths_B,
    )
    torch.testing.assert_close(weights_B, torch.full_like(weights_B, math.exp(per_token / 4)))


def test_3_training_takes_the_log_ratio_per_token(weigh: Callable[..., list[Any]]) -> None:
    for row in weigh(log_ratio="mean"):
        expected = by_hand(row, row.advantage, per_token=True)
        assert row.weight == pytest.approx(expected, rel=1e-5)
        assert row.weight != pytest.approx(by_hand(row, row.advantage), rel=1e-3)


# --- 4: ties --------------------------------------------------------------------------------------


@FEW
@given(rewards=REWARDS, mask=MASKS, mode=MODES, baseline=BASELINES, noise=LOGPS)
def test_4_rewards_within_the_tolerance_give_no_advantage_at_all(
    rewards: Any, mask: Any, mode: Any, baseline: Any, noise: Any
) -> None:
    valid_PK = torch.as_tensor(mask)
    noisy_PK = of(rewards) + 1e-5 * of(
        noise
    )  # differences below 6e-4, those of rewards are at least 0.25
    advantages_PK = normalized_advantages(
        noisy_PK, mode=mode, baseline=baseline, valid=valid_PK, tie_tolerance=1e-3
    )
    tied_P = tied(of(rewards), valid=valid_PK)
    assert torch.equal(tied(noisy_PK, tolerance=1e-3, valid=valid_PK), tied_P)
    assert not advantages_PK[tied_P].any()
    for prompt in (~tied_P).nonzero().flatten():
        assert advantages_PK[prompt].abs().max() > 0.05


@pytest.mark.parametrize("mode", ["none", "per_prompt", "batch"])
def test_4_training_takes_no_noise_for_a_signal(weigh: Callable[..., list[Any]], mode: str) -> None:
    noisy, told = weigh(adv_norm=mode), weigh(adv_norm=mode, tie_tolerance=1e-3)
    assert [row.advantage for row in noisy[4:7]] == [0, 0, 0]
    assert [row.advantage for row in told[4:]] == [0] * 5
    assert all(row.advantage != 0 for row in noisy[7:])
    if mode == "per_prompt":
        assert [row.advantage for row in noisy[7:]] == pytest.approx([1, -1], rel=1e-3)
    assert all(row.advantage for row in told[:4])


def test_4_tied_prompts_are_left_out_on_demand(weigh: Callable[..., list[Any]]) -> None:
    exact = weigh(drop_ties=True)
    assert [row.weight is None for row in exact] == [False] * 4 + [True] * 3 + [False] * 2
    close = weigh(drop_ties=True, tie_tolerance=1e-3)
    assert [row.weight is None for row in close] == [False] * 4 + [True] * 5


def test_4_steps_of_ties_alone_change_nothing_and_end_training_only_at_the_last_step(
    train: Callable[..., DARTrainer], make_model: Callable[..., Any], sink: RecordingSink
) -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"drop_ties": True, "max_steps": 4, "weight_decay": 0.1}
    with pytest.raises(TrainingError, match="none of the 4 steps changed the model"):
        train(
            model=model,
            sink=sink,
            settings=settings,
            reward_funcs=lambda completions, **columns: [0.5] * len(completions),
        )
    assert sorted(sink.reports) == [1, 2, 3, 4]
    assert {values["rewards/zero_variance_fraction"] for values in sink.reports.values()} == {1.0}
    empty = [message for _, message, data in sink.events if data["kind"] == "empty_step"]
    assert len(empty) == 4
    assert all("no two different rewards" in message for message in empty)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- 5: self-normalised weights -------------------------------------------------------------------


@FEW
@given(logps=LOGPS, mask=MASKS)
def test_5_normalised_weights_have_mean_one_and_the_same_proportions(logps: Any, mask: Any) -> None:
    valid_PK = torch.as_tensor(mask)
    weights_PK = (of(logps) / 10).exp().masked_fill(~valid_PK, 0.0)
    whole_PK = self_normalized(weights_PK, mode="batch", valid=valid_PK)
    if valid_PK.any():
        assert whole_PK[valid_PK].mean().item() == pytest.approx(1)
        torch.testing.assert_close(whole_PK * weights_PK.sum(), weights_PK * whole_PK.sum())
    own_PK = self_normalized(weights_PK, mode="per_prompt", valid=valid_PK)
    for weights_K, valid_K in zip(own_PK, valid_PK, strict=True):
        assert not valid_K.any() or weights_K[valid_K].mean().item() == pytest.approx(1)
    assert torch.equal(self_normalized(weights_PK, mode="none", valid=valid_PK), weights_PK)


def test_5_training_normalises_clipped_weights(weigh: Callable[..., list[Any]]) -> None:
    plain = [row.weight for row in weigh(dar_wclip=1.5)]
    assert 1.5 in plain
    whole = [row.weight for row in weigh(dar_wclip=1.5, weight_norm="batch")]
    assert whole == pytest.approx([weight * 9 / sum(plain) for weight in plain], rel=1e-5)
    own = [row.weight for row in weigh(dar_wclip=1.5, weight_norm="per_prompt")]
    expected = [
        weight * len(part) / sum(part)
        for part in (plain[:4], plain[4:7], plain[7:])
        for weight in part
    ]
    assert own == pytest.approx(expected, rel=1e-5)


# --- 6: least effective sample size ---------------------------------------------------------------


@FEW
@given(log_weights=LOGPS, mask=MASKS, least=st.floats(0.01, 0.99))
def test_6_the_bound_on_the_effective_sample_size_is_reached_and_not_overshot(
    log_weights: Any, mask: Any, least: float
) -> None:
    valid_PK = torch.as_tensor(mask)
    log_weights_PK = of(log_weights)
    power = flattening_power(log_weights_PK, min_ess=least, valid=valid_PK).item()

    def reached(power: float) -> float:
        scaled_PK = power * (log_weights_PK - log_weights_PK.max())
        return effective_sample_size(scaled_PK.exp(), valid=valid_PK).item()

    assert 0 <= power <= 1
    if valid_PK.any():
        assert reached(power) >= least - 1e-9
        assert power == 1 or reached(power + 1e-6) < least


@FEW
@given(log_weights=LOGPS, clip=st.floats(0.01, 5), least=st.floats(0.01, 0.99))
def test_6_clipping_keeps_the_bound(log_weights: Any, clip: float, least: float) -> None:
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    weights_PK = importance_weights(
        of(log_weights), zeros, zeros, alpha=0.5, beta=0.5, clip=clip, min_ess=least
    )
    assert effective_sample_size(weights_PK).item() >= least - 1e-9
    assert weights_PK.max() <= clip


def test_6_training_flattens_weights_as_if_alpha_and_beta_were_larger(
    weigh: Callable[..., list[Any]],
) -> None:
    sharp = [row.weight for row in weigh(beta=0.02)]
    assert effective_sample_size(of(sharp)) < 0.6
    rows = weigh(beta=0.02, min_ess=0.8)
    weights = of([row.weight for row in rows])
    assert effective_sample_size(weights).item() == pytest.approx(0.8, abs=1e-4)
    torch.testing.assert_close(
        weights.log() / of(sharp).log(),
        torch.full_like(weights, (weights[0].log() / math.log(sharp[0])).item()),
        rtol=1e-4,
        atol=0,
    )
    assert [row.weight for row in weigh(beta=0.02, min_ess=0.05)] == sharp


# --- 7: behavior log-probabilities of the distribution that sampled -------------------------------


def test_7_behavior_is_the_law_that_sampled_or_on_demand_the_policy(
    train: Callable[..., DARTrainer], make_model: Callable[..., Any], new_sink: type[RecordingSink]
) -> None:
    law, policy = new_sink(), new_sink()
    for sink, behavior in ((law, "sampled"), (policy, "policy")):
        options = {"temperature": 0.5, "max_steps": 1, "behavior": behavior}
        train(model=make_model(scale=0.5), sink=sink, settings=options)
    pairs = list(zip(law.shown[1], policy.shown[1], strict=True))
    assert all(sampled.completion == own.completion for sampled, own in pairs)
    for _, own in pairs:
        assert own.logp_behavior == pytest.approx(own.logp_policy, abs=1e-3)
    assert sum(abs(s.logp_behavior - s.logp_policy) for s, _ in pairs) / len(pairs) > 1
    for sampled, _ in pairs:
        assert sampled.weight == pytest.approx(
            by_hand(sampled, sampled.advantage, clip=20), rel=1e-3
        )


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_the_presets_of_the_literature_turn_all_departures_off(
    weigh: Callable[..., list[Any]], preset: str
) -> None:
    rows = weigh(preset=preset, warmup_steps=0)  # its one step would have no learning rate
    rewards = [reward for row in ROWS for reward in row["rewards"]]
    for start, count in ((0, 4), (4, 3), (7, 2)):
        mean = sum(rewards[start : start + count]) / count
        for place in range(start, start + count):
            row, advantage = rows[place], rewards[place] - mean
            assert row.advantage == pytest.approx(advantage, abs=1e-6)
            clip = {"paper": 20.0, "reference": 50.0}[preset]
            assert row.weight == pytest.approx(by_hand(row, advantage, clip=clip), rel=1e-5)


def test_a_float64_model_is_weighed_in_float64(
    weigh: Callable[..., list[Any]], make_model: Callable[..., Any]
) -> None:
    rows = weigh(model=make_model().double(), baseline="leave_one_out")
    for row in rows:
        assert row.weight == pytest.approx(by_hand(row, row.advantage), rel=1e-13)
    assert rows[1].advantage == pytest.approx(0.25 - 0.5, abs=1e-15)
    assert rows[0].logp_ref == rows[0].logp_policy != torch.tensor(rows[0].logp_ref).item()


# --- groups of unequal size -----------------------------------------------------------------------


def test_prompts_with_a_single_completion_are_compared_with_each_other(
    weigh: Callable[..., list[Any]],
) -> None:
    singles = [
        {
            "prompt_ids": [token],
            "completion_ids": [[token + 1, 3]],
            "rewards": [reward],
            "behavior_logps": [-8.0],
        }
        for token, reward in ((21, 1.0), (24, 0.0), (27, 0.5))
    ]
    rows = weigh([*singles, ROWS[2]])
    assert [row.advantage for row in rows[:3]] == pytest.approx([0.5, -0.5, 0])
    assert [row.advantage for row in rows[3:]] == pytest.approx([5e-5, -5e-5], rel=1e-2)
    own = weigh([*singles, ROWS[2]], weight_norm="per_prompt")
    assert own[0].weight > 1 > own[1].weight
    assert sum(row.weight for row in own[:3]) == pytest.approx(3)
    alone = weigh([singles[0], ROWS[0]])
    assert [row.weight is None for row in alone] == [True] + [False] * 4


# --- no option is accepted and then ignored -------------------------------------------------------


def test_the_other_options_of_the_algorithm_change_the_weights_too(
    weigh: Callable[..., list[Any]],
) -> None:
    plain = [row.weight for row in weigh()]
    for change in ({"alpha": 0.5}, {"beta": 1.0}, {"dar_wclip": 1.1}, {"adv_norm": "batch"}):
        assert [row.weight for row in weigh(**change)] != plain, change


# --- 8: control variates -------------------------------------------------------------------------


@FEW
@given(LOGPS, LOGPS, arrays("float64", (3, 4), elements=st.floats(0, 20)))
def test_control_variates_leave_the_expected_gradient_as_it_is(
    policy: Any, behavior: Any, weights: Any
) -> None:
    """Over all K completions of a prompt, each drawn with its probability under mu."""
    logits_PK = (of(policy) / 8).requires_grad_()
    policy_PK, behavior_PK = logits_PK.log_softmax(dim=1), (of(behavior) / 8).log_softmax(dim=1)
    mu_PK, taken_PK = behavior_PK.exp(), control_variates(policy_PK, behavior_PK, clip=math.inf)
    plain = torch.autograd.grad(
        (mu_PK * of(weights) * policy_PK).sum(), logits_PK, retain_graph=True
    )
    less = torch.autograd.grad((mu_PK * (of(weights) - taken_PK) * policy_PK).sum(), logits_PK)
    torch.testing.assert_close(less[0], plain[0], rtol=1e-9, atol=1e-9)


def test_control_variates_are_1_on_policy_and_bounded_off_it() -> None:
    policy_B, behavior_B = of([-3.0, -2.0, -900.0]), of([-3.0, -9.0, -1.0])
    taken_B = control_variates(policy_B, behavior_B, clip=20.0)
    assert taken_B.tolist() == [1.0, 20.0, 0.0]


def test_with_control_variates_a_step_without_a_signal_changes_little(
    train: Callable[..., DARTrainer],
) -> None:
    """Plain weights of 1 train on the policy's own samples, which is noise. What is left are the
    padding tokens, which this policy would sample if it could."""

    def gradient(**options: Any) -> float:
        options |= {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
        trainer = train(
            reward_funcs=lambda completions, **_: [1.0] * len(completions), settings=options
        )
        return float(trainer.reporter.reported["train/grad_norm"])

    assert gradient(control_variate=True) < 0.2 * gradient(control_variate=False)
    assert gradient() == gradient(control_variate=False)
