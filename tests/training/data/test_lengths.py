"""How rows become tokens: where they are cut, how they end, and that their layout in a batch
changes nothing.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.training import DARTrainer, DataCollatorForDAR
from dar.training.data.rows import TokenPair
from dar.training.step.offline import RowEncoder
from fakes.recording_sink import RecordingSink

Rows = list[dict[str, Any]]


def user(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TALKS: Rows = [
    {"prompt": user("w20"), "chosen": says("w30"), "rejected": says("w40")},
    {"prompt": user("w21"), "chosen": says("w31"), "rejected": says("w41")},
]
TEXTS: Rows = [
    {"prompt": "w10 w20", "completion": [" w30", " w40 w41"], "rewards": [1.0, 0.0]},
    {"prompt": "w10", "completion": [" w31 w32", " w42"], "rewards": [1.0, 0.0]},
]


@pytest.fixture
def encode(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    def run(row: dict[str, Any], **changes: Any) -> Any:
        values = {"longest": 12, "vocabulary": 64, "eos_ids": [3], "max_prompt_length": None}
        values |= {"tokenizer": tokenizer} | changes
        return RowEncoder(**values)(row)

    return run


def test_a_completion_that_is_too_long_is_cut_on_the_right_and_has_no_end(
    encode: Callable[..., Any],
) -> None:
    long, short = " ".join(f"w{i}" for i in range(20, 40)), "w50"
    row = {"prompt": "w10 w11", "completions": [long, short], "rewards": [1, 0]}
    cut, whole = encode(row).completions
    assert (cut.ids, cut.finish_reason) == (list(range(20, 29)), "length")
    assert (whole.ids, whole.finish_reason) == ([50, 3], "stop")


def test_only_the_prompt_that_is_too_long_is_cut(
    replay: Callable[..., Any], sink: RecordingSink
) -> None:
    long = " ".join(f"w{i}" for i in range(4, 30))
    rows = [
        {"prompt": long, "completions": [" w50 w51", " w52"], "rewards": [1, 0]},
        {"prompt": "w40 w41 w42", "completions": [" " + long, " w53"], "rewards": [1, 0]},
    ]
    settings = {"max_length": 16, "max_steps": 1}
    replay(rows, sink=sink, settings=settings)
    assert [data["cut_tokens"] for _, _, data in sink.events] == [27 - 13]
    shown = {(row.prompt, row.completion_tokens, row.finish_reason) for row in sink.shown[1]}
    assert {item[1:] for item in shown if item[0] == "w40 w41 w42"} == {(12, "length"), (2, "stop")}
    assert {item[1:] for item in shown if item[0] == long} == {(3, "stop"), (2, "stop")}


def test_prompts_give_way_to_completions_down_to_half_of_the_length(
    encode: Callable[..., Any],
) -> None:
    long = " ".join(f"w{i}" for i in range(20, 40))
    both = encode({"prompt": long, "completion": long, "reward": 1})
    assert (len(both.ids), both.ids[0], both.ids[-1]) == (6, 2, 39)
    assert [len(one.ids) for one in both.completions] == [6]
    limited = encode({"prompt": long, "completion": "w50", "reward": 1}, max_prompt_length=4)
    assert (limited.ids, limited.completions[0].ids) == ([2, 37, 38, 39], [50, 3])


def test_a_stored_log_probability_of_a_completion_that_must_be_cut_is_refused(
    replay: Callable[..., Any], sink: RecordingSink
) -> None:
    long = " ".join(f"w{i}" for i in range(20, 40))
    rows = [
        {"prompt": "w10", "completion": text, "reward": 1, "behavior_logps": -9.0}
        for text in ("w4", long)
    ]
    with pytest.raises(InvalidRequestError, match=r"row 2: .*21 tokens must be cut to 10"):
        replay(rows, sink=sink, settings={"max_length": 12})
    assert sink.phases == []


def test_a_padding_token_that_is_the_end_token_trains_the_end(
    encode: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, replay: Callable[..., Any]
) -> None:
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    (one,) = encode(
        {"prompt": "w10", "completion": "w20 <pad> w21", "reward": 1}, tokenizer=tokenizer
    ).completions
    assert one.ids == [20, 1, 21, 3]
    one_way, other_way = replay(TEXTS, processing_class=same), replay(TEXTS)
    assert all(torch.equal(one_way[name], other_way[name]) for name in other_way)
    batch = DataCollatorForDAR(pad_token_id=3)([TokenPair([2, 10], one.ids), TokenPair([2], [3])])
    assert batch["completion_mask"].sum(dim=1).tolist() == [4, 1]


def test_an_answer_goes_on_where_an_assistants_prompt_ends(
    encode: Callable[..., Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = user("w20") + says("w21")
    row = {"prompt": prompt, "completion": says(" w22"), "reward": 1}
    encoded = encode(row)
    assert (encoded.ids, encoded.completions[0].ids) == ([2, 10, 20, 11, 21], [22, 3])


def test_a_line_break_behind_the_end_of_a_turn_is_no_part_of_the_completion(
    encode: Callable[..., Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = broken.chat_template.replace("' <eos> '", "' <eos> w60 '")
    row = {"prompt": user("w20"), "completion": "w30", "reward": 1}
    # Words behind the end are no line break: they stay, and an end is appended to them.
    assert encode(row, tokenizer=broken).completions[0].ids == [30, 3, 60, 3]
    broken.chat_template = tokenizer.chat_template.replace("' <eos> '", "' <eos> \n\n '")
    assert encode(row, tokenizer=broken).completions[0].ids == [30, 3]
    broken.chat_template = tokenizer.chat_template.replace("' <eos> '", "''")
    assert encode(row, tokenizer=broken).completions[0].ids == [30, 3]


def test_a_template_that_rewrites_the_prompt_is_refused_with_the_place(
    replay: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, sink: RecordingSink
) -> None:
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = "{{ messages | length }} " + tokenizer.chat_template
    with pytest.raises(
        InvalidRequestError, match=r"row 1: .*template writes the prompt differe"
    ) as e:
        replay(TALKS, processing_class=rewriting, sink=sink)
    assert "alone it has '1 <bos>" in str(e.value)
    assert sink.phases == []


class MorePadding(DataCollatorForDAR):
    """The same batches with more padding on both sides, and of another kind."""

    def __call__(self, features: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        for name, values in batch.items():
            left = 0 if name == "completion_mask" else 5
            batch[name] = torch.nn.functional.pad(values, (left, 3))
        return batch


@pytest.fixture
def gpt2() -> Callable[[], GPT2LMHeadModel]:
    def make() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=2,
            eos_token_id=3,
        )
        return GPT2LMHeadModel(config).eval()

    return make


UNEQUAL: Rows = [
    {"prompt": "w4 w5 w6 w7 w8 w9", "completions": ["w20", "w21 w22 w23 w24"], "rewards": [1, 0]},
    {"prompt": "w10", "completions": ["w25 w26", "w27", "w28"], "rewards": [0.2, 0.9, 0.1]},
    {"prompt": "w11 w12 w13", "completions": ["w29 w30 w31 w32 w33", "w34"], "rewards": [0, 1]},
]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_and_the_order_of_prompts_change_nothing(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    gpt2: Callable[[], GPT2LMHeadModel],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
) -> None:
    settings = {"max_steps": 2, "per_device_train_batch_size": 3, "optim": "sgd"}
    settings["learning_rate"] = 0.05

    def run(rows: Rows, padding: DataCollatorForDAR | None = None) -> dict[str, torch.Tensor]:
        model = make_model() if architecture == "llama" else gpt2()
        begun = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.MonkeyPatch.context() as patch:
            if padding is not None:
                patch.setattr("dar.training.trainer.DataCollatorForDAR", lambda: padding)
            trainer = train(model=model, train_dataset=rows, reward_funcs=None, settings=settings)
        return {name: p.detach() - begun[name] for name, p in trainer.model.named_parameters()}

    plain = run(UNEQUAL)
    assert max(change.abs().max() for change in plain.values()) > 1e-3
    others = [run(UNEQUAL, MorePadding(pad_token_id=3)), run(UNEQUAL[::-1])]
    monkeypatch.setattr("dar.training.model.logprobs.MAX_ROWS", 1)
    others.append(run(UNEQUAL))
    for other in others:
        for name, change in plain.items():
            torch.testing.assert_close(other[name], change, atol=2e-6, rtol=1e-4)
