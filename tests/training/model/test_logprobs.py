from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dar.training.data.rows import DataCollatorForDAR, TokenPair
from dar.training.model.logprobs import all_logps, completion_logps, forward_batches, idle_weights

COLLATE = DataCollatorForDAR(1)


def pairs_of(case: dict[str, Any]) -> list[TokenPair]:
    return [
        TokenPair(prompt, completion)
        for prompt, completion in zip(case["prompt_ids"], case["completion_ids"], strict=True)
    ]


@pytest.mark.parametrize("name", ["policy", "ref"])
def test_sums_agree_with_the_golden_figures(
    end_to_end: dict[str, Any], golden_model: Callable[[str], LlamaForCausalLM], name: str
) -> None:
    model = golden_model(name)
    for case in end_to_end["cases"]:
        logps_B = all_logps(model, pairs_of(case), collate=COLLATE, vocabulary=64)
        expected = torch.tensor(case[f"{name}_logps"])
        torch.testing.assert_close(logps_B, expected, atol=1e-4, rtol=0)


def test_a_sequence_has_the_same_sum_alone_and_beside_longer_ones() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ).eval()
    short, long = TokenPair([5, 6], [7, 1, 0]), TokenPair(list(range(2, 20)), list(range(9)))
    together = all_logps(model, [short, long], collate=COLLATE, vocabulary=50)
    alone = all_logps(model, [short], collate=COLLATE, vocabulary=50)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_bfloat16_is_used_when_asked_for_and_only_then(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model, pairs = make_model(scale=0.3), [TokenPair([2, 7], [9, 30, 12, 3])]
    seen: list[torch.dtype] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.dtype))
    exact = all_logps(model, pairs, collate=COLLATE, vocabulary=64)
    rounded = all_logps(model, pairs, collate=COLLATE, vocabulary=64, half=torch.bfloat16)
    assert seen == [torch.float32, torch.bfloat16]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)


def test_padding_and_end_tokens_inside_a_completion_count_like_any_other(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = make_model()
    ids = [9, 1, 3, 1, 12]
    batch = COLLATE([{"prompt_ids": [2, 7], "completion_ids": ids}])
    with torch.no_grad():
        logps_TV = model(torch.tensor([[2, 7, *ids]])).logits[0].log_softmax(-1)
        total = completion_logps(model, batch).item()
    expected = sum(logps_TV[1 + i, token].item() for i, token in enumerate(ids))
    assert total == pytest.approx(expected, abs=1e-4)


def test_forward_passes_hold_every_sequence_once_within_bounds() -> None:
    pairs = [TokenPair([0] * (i % 7 + 1), [0] * (i % 300 + 1)) for i in range(500)]
    batches = list(forward_batches(pairs, vocabulary=32_000))
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    for batch in batches:
        prompt = max(len(pairs[i].prompt_ids) for i in batch)
        completion = max(len(pairs[i].completion_ids) for i in batch)
        assert len(batch) <= 64
        assert len(batch) * (prompt + completion) <= 16_384
        assert len(batch) * (completion + 1) * 32_000 <= 2**28 or len(batch) == 1


def test_weights_that_text_does_not_reach_are_found_and_frozen_ones_are_not(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = make_model().train()
    assert idle_weights(model) == []
    model.activation_checkpointing_enable()
    model.for_images = torch.nn.Linear(3, 3)
    model.model.norm.weight.requires_grad_(requires_grad=False)
    assert idle_weights(model) == ["for_images.weight", "for_images.bias"]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
