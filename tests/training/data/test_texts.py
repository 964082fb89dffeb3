"""Texts of completions: what is trained on and what a reward function sees is what was written."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dar.training import DARConfig, DARTrainer
from dar.training.step.records import ScoredStep
from fakes import tiny_models, tiny_tokenizers
from fakes.recording_sink import RecordingSink

Rows = list[dict[str, Any]]

PARTED = [
    ("The sky is", " blue."), ("The sky is ", "blue."), ("The sky is", "\nblue"), ("hel", "lo world"),
    ("x", "  two\n\nlines  "), ("q:", "é😀 I say , yes"), ("a<eot>", "yes"), ("a<tool>", " yes"),
    ("a", "yes<tool>no <tool>  yes"), ("b", " "),
]  # fmt: skip
"""Prompts and completions that are one text."""


@pytest.fixture
def preview(config: Callable[..., DARConfig], sink: RecordingSink) -> Callable[..., ScoredStep]:
    """The first step of a run, untrained; with the tokens ``written``, if there are any."""

    def run(
        tokenizer: PreTrainedTokenizerFast,
        rows: Rows,
        reward: Callable[..., list[float]] | None = None,
        *,
        written: Sequence[int] = (),
        start: int = 0,
        vocab_size: int | None = None,
        **settings: Any,
    ) -> ScoredStep:
        model = tiny_models.writing(written, start, vocab_size=vocab_size or len(tokenizer))
        settings = {"per_device_train_batch_size": len(rows)} | settings
        return DARTrainer(
            model, config(**settings), rows, reward, processing_class=tokenizer, sink=sink
        ).preview(len(rows))

    return run


def stored(text: Any, completion: Any) -> dict[str, Any]:
    return {"prompt": text, "completions": [completion, completion], "rewards": [1.0, 0.0]}


def says(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@pytest.mark.parametrize("kind", tiny_tokenizers.EXACT)
def test_tokens_that_are_trained_on_decode_to_the_text_of_the_row(
    preview: Callable[..., ScoredStep], sink: RecordingSink, kind: str
) -> None:
    tokenizer = tiny_tokenizers.EXACT[kind]()
    expected = {text + "<eot>" for _, text in PARTED}
    for rows in (
        [stored(*parted) for parted in PARTED],
        [stored(says(before, "user"), says(text)) for before, text in PARTED],
    ):
        step = preview(tokenizer, rows)
        found = {after(tokenizer, pair.prompt_ids, pair.completion_ids) for pair in step.pairs}
        assert found == expected
        prompts = [prompt.ids for prompt in step.prompts]
        assert all(pair.prompt_ids in prompts for pair in step.pairs)
        assert set(step.texts) == {text.replace("<tool>", "") for _, text in PARTED}
    assert sink.events == []


def after(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    before, both = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *ids])
    assert both.startswith(before)
    return str(both[len(before) :])


@pytest.mark.parametrize("kind", tiny_tokenizers.EXACT)
@pytest.mark.parametrize(
    ("stop", "seen"), [([], " blue yes . I"), ([" blue"], " blue"), (["e yes ."], " blue yes .")]
)
def test_a_reward_function_sees_exactly_what_follows_the_prompt(
    preview: Callable[..., ScoredStep], kind: str, stop: list[str], seen: str
) -> None:
    tokenizer = tiny_tokenizers.EXACT[kind]()
    tokenizer.clean_up_tokenization_spaces = True  # would move the point to "yes."
    shown: set[str] = set()

    def reward(completions: list[str], **_: object) -> list[float]:
        shown.update(completions)
        return [float(i) for i in range(len(completions))]

    ids = tiny_tokenizers.ids_after(tokenizer, "a", " blue yes . I")
    step = preview(
        tokenizer, [{"prompt": "a"}] * 2, reward, stop=stop, max_new_tokens=len(ids) + 1,
        written=[*ids, tokenizer.eos_token_id], start=len(tokenizer("a")["input_ids"]) - 1,
    )  # fmt: skip
    assert shown == set(step.texts) == {seen}
    assert set(step.finish_reasons) == {"stop"}


@pytest.mark.parametrize("kind", tiny_tokenizers.CHANGING)
def test_a_tokenizer_that_changes_a_text_encodes_it_as_a_whole_and_the_job_warns_once(
    preview: Callable[..., ScoredStep],
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    kind: str,
) -> None:
    tokenizer = tiny_tokenizers.CHANGING[kind]()
    texts = [("The sky is", "  BLUE"), ("play", "ING  yes"), ("hello", "  world , yes")]
    rows = [stored(*parted) for parted in texts]
    step = preview(tokenizer, rows)
    wholes = [tokenizer(before + text)["input_ids"] for before, text in texts]
    closing = tokenizer("a")["input_ids"][-1:] if kind == "word pieces" else []
    expected = [[*ids[: len(ids) - len(closing)], tokenizer.eos_token_id] for ids in wholes]
    joined = [[*pair.prompt_ids, *pair.completion_ids] for pair in step.pairs]
    assert sorted(joined) == sorted(expected * 2)
    sink.events.clear()
    model = tiny_models.policy(vocab_size=len(tokenizer))
    train(model=model, train_dataset=rows, reward_funcs=None, processing_class=tokenizer, sink=sink)
    ((level, message, data),) = sink.events
    assert (level, data["kind"]) == ("warn", "text_changed")
    assert f"cannot reproduce a completion of row {data['row']}: the row has" in message


def test_words_that_would_touch_are_encoded_by_themselves_where_they_would_be_unknown(
    preview: Callable[..., ScoredStep], tokenizer: PreTrainedTokenizerFast, sink: RecordingSink
) -> None:
    step = preview(tokenizer, [stored("w10 w11", "w12")] * 2)
    assert {tuple(pair.completion_ids) for pair in step.pairs} == {(12, 3)}
    assert [data["kind"] for _, _, data in sink.events] == ["text_changed"]


STOPS = [("<tool>", 2), ("e<tool>", 2), ("blue yes", 3), ("<pad>", 5), ("<eot>", 6)]
"""Stop strings, and how many of six parts are written with them."""


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece, always"])
@pytest.mark.parametrize(("stop", "count"), STOPS)
def test_a_stop_string_may_be_a_special_token_contain_one_or_span_one(
    preview: Callable[..., ScoredStep], kind: str, stop: str, count: int
) -> None:
    tokenizer = tiny_tokenizers.EXACT[kind]()
    blue, yes = (tiny_tokenizers.ids_after(tokenizer, "a", text) for text in (" blue", " yes"))
    tool, pad, eot = (
        [one] for one in tokenizer.convert_tokens_to_ids(["<tool>", "<pad>", "<eot>"])
    )
    parts = [blue, tool, yes, tool, pad, eot]
    if stop != "<pad>":
        parts[4] = tool  # padding is impossible, unless it ends a completion
    written = list(chain(*parts))
    step = preview(
        tokenizer, [{"prompt": "a"}] * 2, lambda completions, **_: [1.0] * len(completions),
        written=written, start=len(tokenizer("a")["input_ids"]) - 1, stop=[stop],
        max_new_tokens=len(written) + 1,
    )  # fmt: skip
    assert [pair.completion_ids for pair in step.pairs] == [list(chain(*parts[:count]))] * 8
    assert set(step.finish_reasons) == {"stop"}


@pytest.mark.parametrize("law", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_tokens_that_the_tokenizer_lacks_are_never_sampled(
    config: Callable[..., DARConfig], tokenizer: PreTrainedTokenizerFast, law: dict[str, float]
) -> None:
    size, pad = 4 * len(tokenizer), tokenizer.pad_token_id
    seen: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    model = tiny_models.policy(scale=0.3, vocab_size=size)
    settings = config(dar_k=8, **law)
    trainer = DARTrainer(
        model, settings, [{"prompt": "w10"}] * 3, reward, processing_class=tokenizer
    )
    step = trainer.preview(3)
    assert max(max(ids) for ids in seen) < len(tokenizer)
    assert not any(pad in ids for ids in seen)
    if not law:
        for pair, recorded in zip(step.pairs, step.behavior_logps_B.tolist(), strict=True):
            assert recorded == pytest.approx(
                masked_logp(model, pair, len(tokenizer), pad), abs=1e-3
            )


def masked_logp(model: LlamaForCausalLM, pair: Any, size: int, pad: int) -> float:
    """Log-probability of a completion where only the tokenizer's tokens are possible."""
    ids = torch.tensor([[*pair.prompt_ids, *pair.completion_ids]])
    with torch.no_grad():
        logits_TV = model(ids).logits[0, :-1].float()
    logits_TV[:, size:] = -torch.inf
    logits_TV[:, pad] = -torch.inf
    logps_TV = logits_TV.log_softmax(dim=-1)[len(pair.prompt_ids) - 1 :]
    return float(logps_TV.gather(1, torch.tensor([pair.completion_ids]).T).sum())
