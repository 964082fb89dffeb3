import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError, TrainingError
from dar.training import DARConfig
from dar.training.data.rows import DataCollatorForDAR, TokenPair
from dar.training.model.logprobs import all_logps
from dar.training.sampling.sampler import Completion, Sampler, draw, uniforms


def chi_square_quantile(degrees: int) -> float:
    """99.9 % quantile, by Wilson and Hilferty."""
    ninth = 2 / (9 * degrees)
    return degrees * (1 - ninth + 3.0902 * math.sqrt(ninth)) ** 3


PROMPTS = [[2, 10, 20], [2, 33], [2, 4, 5, 6, 7, 8], [2, 60, 61]]
EOS = frozenset({3})


@pytest.fixture
def sampler(
    config: Callable[..., DARConfig], tokenizer: PreTrainedTokenizerBase
) -> Callable[..., Sampler]:
    def make(eos: frozenset[int] = EOS, max_length: int = 128, **settings: Any) -> Sampler:
        settings = {"max_new_tokens": 12} | settings
        return Sampler(config(**settings), tokenizer, eos_ids=eos, max_length=max_length)

    return make


def next_logps(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


def policy_logps(model: LlamaForCausalLM, completions: list[Completion]) -> torch.Tensor:
    k = len(completions) // len(PROMPTS)
    pairs = [TokenPair(PROMPTS[i // k], c.ids) for i, c in enumerate(completions)]
    return all_logps(model, pairs, collate=DataCollatorForDAR(1), vocabulary=64)


def test_unfiltered_sampling_records_the_policys_own_log_probabilities(
    make_model: Callable[..., LlamaForCausalLM], sampler: Callable[..., Sampler]
) -> None:
    model = make_model(scale=0.3)
    # the padding token ends completions here, so that no token is impossible
    completions = sampler(frozenset({1, 3})).sample(model, PROMPTS, step=1)
    recorded = torch.tensor([completion.logp for completion in completions])
    torch.testing.assert_close(recorded, policy_logps(model, completions), atol=1e-4, rtol=0)
    assert len({tuple(completion.ids) for completion in completions}) > 8


def test_a_slice_of_the_prompts_is_sampled_as_within_the_whole(
    make_model: Callable[..., LlamaForCausalLM], sampler: Callable[..., Sampler]
) -> None:
    model = make_model(scale=0.3)
    whole = sampler().sample(model, PROMPTS, step=3)
    first = sampler().sample(model, PROMPTS[:1], step=3)
    rest = sampler().sample(model, PROMPTS[1:], step=3, numbers=[1, 2, 3])
    assert [c.ids for c in [*first, *rest]] == [c.ids for c in whole]
    assert sampler().sample(model, [], step=3, numbers=[]) == []


@pytest.mark.parametrize(
    "law",
    [
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.4},
    ],
)
def test_the_policys_own_log_probabilities_are_recorded_instead_of_the_laws_when_asked_for(
    make_model: Callable[..., LlamaForCausalLM],
    sampler: Callable[..., Sampler],
    law: dict[str, float],
) -> None:
    model = make_model(scale=0.3)
    sampled = sampler(**law).sample(model, PROMPTS, step=1)
    own = sampler(**law, behavior="policy").sample(model, PROMPTS, step=1)
    assert [c.ids for c in own] == [c.ids for c in sampled]
    recorded = torch.tensor([completion.logp for completion in own])
    torch.testing.assert_close(recorded, policy_logps(model, own), atol=1e-4, rtol=0)
    assert all(c.logp < of_law.logp - 0.1 for c, of_law in zip(own, sampled, strict=True))


def test_a_double_precision_model_is_sampled_in_double_precision(
    make_model: Callable[..., LlamaForCausalLM], sampler: Callable[..., Sampler]
) -> None:
    model = make_model(scale=0.3).double()
    completions = sampler(frozenset({1, 3})).sample(model, PROMPTS, step=1)
    recorded = torch.tensor([completion.logp for completion in completions], dtype=torch.float64)
    own = policy_logps(model, completions)
    assert own.dtype == torch.float64
    torch.testing.assert_close(recorded, own, atol=1e-10, rtol=0)
    _, logps_B = draw(torch.randn(5, 7, dtype=torch.float64), torch.rand(5, dtype=torch.float64))
    assert logps_B.dtype == torch.float64


def law_of_texts(
    model: LlamaForCausalLM, prompt: list[int], length: int, law: dict[str, float]
) -> dict[tuple[int, ...], float]:
    """Probability of every completion of at most ``length`` tokens that token 3 ends."""
    open_texts, closed = {(): 0.0}, {}
    for position in range(length):
        following = {}
        for text, logp in open_texts.items():
            logps = filtered(next_logps(model, [*prompt, *text]), **law).tolist()
            for token, own in enumerate(logps):
                is_closed = token == 3 or position == length - 1
                (closed if is_closed else following)[(*text, token)] = logp + own
        open_texts = following
    return {text: math.exp(logp) for text, logp in closed.items() if logp > -math.inf}


@pytest.mark.parametrize("law", [{"temperature": 0.6}, {"top_p": 0.9, "top_k": 6}])
def test_whole_completions_occur_as_often_as_the_law_says(
    make_model: Callable[..., LlamaForCausalLM],
    sampler: Callable[..., Sampler],
    law: dict[str, float],
) -> None:
    model, prompt, count = make_model(vocab_size=8, scale=0.2), [2, 5], 4096
    expected = law_of_texts(model, prompt, 3, law)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-4)
    completions = sampler(dar_k=count, max_new_tokens=3, **law).sample(model, [prompt], step=1)
    seen = Counter(tuple(completion.ids) for completion in completions)
    assert seen.keys() <= expected.keys()
    common = [text for text, p in expected.items() if p * count >= 5]
    rest = 1 - sum(expected[text] for text in common)
    cells = [(seen[text], expected[text] * count) for text in common]
    cells.append((count - sum(n for n, _ in cells), rest * count))
    statistic = sum((n - mean) ** 2 / mean for n, mean in cells if mean >= 1)
    assert len(common) > 20
    assert statistic < chi_square_quantile(len(cells) - 1)


def test_a_prompt_with_a_token_that_the_model_has_not_is_refused(
    make_model: Callable[..., LlamaForCausalLM], sampler: Callable[..., Sampler]
) -> None:
    with pytest.raises(InvalidRequestError, match="token 64, but the model has tokens 0 to 63"):
        sampler().sample(make_model(), [[2, 5], [2, 64]], step=1)


def test_gradient_checkpointing_does_not_cost_sampling_its_cache(
    make_model: Callable[..., LlamaForCausalLM], sampler: Callable[..., Sampler]
) -> None:
    model = make_model(scale=0.3)
    plain = sampler().sample(model, PROMPTS, step=1)
    model.activation_checkpointing_enable()
    assert sampler().sample(model.train(), PROMPTS, step=1) == plain


@pytest.mark.parametrize(
    "law",
    [
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_filtered_sampling_records_the_law_that_really_sampled(
    make_model: Callable[..., LlamaForCausalLM],
    sampler: Callable[..., Sampler],
    law: dict[str, float],
) -> None:
    model = make_model(scale=0.3)
    for row, completion in enumerate(sampler(**law).sample(model, PROMPTS, step=1)):
        ids, total = list(PROMPTS[row // 4]), 0.0
        for token in completion.ids:
            total += filtered(next_logps(model, ids), **law)[token].item()
            ids.append(token)
        assert completion.logp == pytest.approx(total, abs=1e-3)


def filtered(
    logits_V: torch.Tensor,
    *,
    temperature: float = 1,
    top_k: int = 0,
    top_p: float = 1,
    min_p: float = 0,
) -> torch.Tensor:
    """The distribution computed again, one token at a time."""
    logits_V = logits_V.clone()
    logits_V[1] = -torch.inf
    logits_V /= temperature
    order = logits_V.argsort(descending=True).tolist()
    if top_k:
        order = order[:top_k]
    probabilities = torch.softmax(logits_V[order], 0).tolist()
    kept, mass = [], 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if mass < top_p and probability >= min_p * probabilities[0]:
            kept.append(token)
        mass += probability
    result_V = torch.full_like(logits_V, -torch.inf)
    result_V[kept] = logits_V[kept].log_softmax(0)
    return result_V


def test_the_repetition_penalty_reads_the_prompt_and_never_its_padding(
    make_model: Callable[..., LlamaForCausalLM], sampler: Callable[..., Sampler]
) -> None:
    model, penalty = make_model(scale=0.3), 1.7
    # token 1 pads and, as in many models, also ends: a penalty on the padding would change how long
    # completions are
    completions = sampler(frozenset({1}), repetition_penalty=penalty).sample(model, PROMPTS, step=1)
    for row, completion in enumerate(completions):
        ids, total = list(PROMPTS[row // 4]), 0.0
        for token in completion.ids:
            scores_V = next_logps(model, ids)
            seen = sorted(set(ids))
            values = scores_V[seen]
            scores_V[seen] = torch.where(values < 0, values * penalty, values / penalty)
            total += scores_V.log_softmax(0)[token].item()
            ids.append(token)
        assert completion.logp == pytest.approx(total, abs=1e-3)


def test_a_completion_depends_on_its_place_and_not_on_its_neighbours(
    make_model: Callable[..., LlamaForCausalLM],
    sampler: Callable[..., Sampler],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(scale=0.3)
    whole = sampler().sample(model, PROMPTS, step=5)
    longer_neighbour = [*PROMPTS[:3], [2, *range(10, 40)]]
    beside_it = sampler().sample(model, longer_neighbour, step=5)
    monkeypatch.setattr("dar.training.sampling.sampler.MAX_ROWS", 4)
    one_by_one = sampler().sample(model, PROMPTS, step=5)
    assert [c.ids for c in beside_it[:12]] == [c.ids for c in whole[:12]]
    assert [c.ids for c in one_by_one] == [c.ids for c in whole]


def test_noise_differs_between_steps_seeds_rows_and_blocks() -> None:
    drawn = [
        uniforms(seed, step, [row], block)[0, 0].item()
        for seed in (0, 1)
        for step in (1, 2)
        for row in (0, 1)
        for block in (0, 1)
    ]
    assert len(set(drawn)) == 16
    assert torch.equal(uniforms(3, 4, [5, 6], 0)[1], uniforms(3, 4, [6], 0)[0])


def test_drawn_frequencies_follow_the_distribution() -> None:
    scores_V = torch.tensor([0.0, -torch.inf, 1.0, -2.0])
    grid_B = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens_B, logps_B = draw(scores_V.expand(10_000, -1), grid_B)
    frequencies = torch.bincount(tokens_B, minlength=4) / 10_000
    torch.testing.assert_close(frequencies, scores_V.softmax(0), atol=2e-4, rtol=0)
    torch.testing.assert_close(logps_B, scores_V.log_softmax(0)[tokens_B])


def test_padding_is_never_sampled_and_the_end_token_ends(
    make_model: Callable[..., LlamaForCausalLM], sampler: Callable[..., Sampler]
) -> None:
    completions = sampler(dar_k=32, max_new_tokens=40).sample(make_model(), PROMPTS, step=1)
    assert all(1 not in completion.ids for completion in completions)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        has_ended = completion.ids[-1] == 3
        assert 3 not in completion.ids[:-1]
        assert completion.finish_reason == ("stop" if has_ended else "length")
        assert has_ended or len(completion.ids) == 40


def test_a_stop_string_ends_a_completion_as_soon_as_it_contains_it(
    make_model: Callable[..., LlamaForCausalLM],
    sampler: Callable[..., Sampler],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    settings = {"dar_k": 16, "max_new_tokens": 40}
    plain = sampler(**settings).sample(make_model(), PROMPTS, step=1)
    stopped = sampler(**settings, stop=["w5", "w17 w"]).sample(make_model(), PROMPTS, step=1)
    hits = 0
    for before, after in zip(plain, stopped, strict=True):
        assert after.ids == before.ids[: len(after.ids)]
        text = tokenizer.decode(after.ids, skip_special_tokens=True)
        shorter = tokenizer.decode(after.ids[:-1], skip_special_tokens=True)
        assert "w5" not in shorter
        if "w5" in text:
            hits += 1
            assert after.finish_reason == "stop"
    assert hits > 30


def test_a_stop_string_of_several_tokens_ends_a_completion(
    make_model: Callable[..., LlamaForCausalLM],
    sampler: Callable[..., Sampler],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    completions = sampler().sample(make_model(), PROMPTS, step=1)
    row = next(i for i, completion in enumerate(completions) if min(completion.ids[:6]) > 3)
    plain = completions[row]
    stop = tokenizer.decode(plain.ids[2:6], skip_special_tokens=True)
    stopped = sampler(stop=[stop]).sample(make_model(), PROMPTS, step=1)[row]
    assert len(stop.split()) == 4
    assert stopped.ids[:5] == plain.ids[:5]
    assert len(stopped.ids) == 6
    assert stopped.finish_reason == "stop"


def test_prompt_and_completion_stay_within_the_longest_sequence(
    make_model: Callable[..., LlamaForCausalLM], sampler: Callable[..., Sampler]
) -> None:
    completions = sampler(frozenset(), max_length=10).sample(make_model(), PROMPTS, step=1)
    assert [len(c.ids) for c in completions[::4]] == [7, 8, 4, 7]


def test_a_broken_policy_is_an_error_and_not_a_completion(
    make_model: Callable[..., LlamaForCausalLM], sampler: Callable[..., Sampler]
) -> None:
    model = make_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not numbers"):
        sampler().sample(model, PROMPTS, step=1)
