import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.training import DataCollatorForDAR
from dar.training.data.rows import PromptEncoder, check_rows, read_rows
from dar.training.sampling.prompts import PromptOrder


def test_plain_prompts_get_a_bos_token_once(tokenizer: PreTrainedTokenizerBase) -> None:
    encode = PromptEncoder(tokenizer, 100)
    assert encode({"prompt": "w10 w20"}).ids == [2, 10, 20]
    assert encode({"prompt": "<bos> w10"}).ids == [2, 10]
    assert encode({"prompt": ""}).ids == [2]


def test_prompt_ids_are_a_column_where_completions_are_sampled(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    online = PromptEncoder(tokenizer, 100)({"prompt_ids": [10, 20], "prompt": "w30"})
    assert online.ids == [2, 30]
    assert online.columns == {"prompt_ids": [10, 20]}
    check_rows([{"prompt_ids": [], "prompt": "w30"}])


def test_conversations_go_through_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = PromptEncoder(tokenizer, 100)({"prompt": [{"role": "user", "content": "w60 w32"}]})
    assert prompt.ids == [2, 10, 60, 32, 11]
    assert prompt.messages == [{"role": "user", "content": "w60 w32"}]
    assert prompt.text == "<bos> w10 w60 w32 w11"


def test_a_conversation_without_chat_template_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        PromptEncoder(plain, 100)({"prompt": [{"role": "user", "content": "w60"}]})


def test_a_prompt_without_any_token_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    without_bos = copy.deepcopy(tokenizer)
    without_bos.bos_token = None
    with pytest.raises(InvalidRequestError, match="no tokens"):
        PromptEncoder(without_bos, 100)({"prompt": ""})


def test_long_prompts_lose_their_beginning_but_not_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = PromptEncoder(tokenizer, 4)({"prompt": "w10 w20 w30 w40 w50"})
    assert prompt.ids == [2, 30, 40, 50]
    assert prompt.cut_tokens == 2


@pytest.mark.parametrize(
    ("longest", "ids"),
    [
        (12, [2, 12, 4, 10, 60, 11, 5, 10, 61, 11]),
        (7, [2, 12, 4, 10, 61, 11]),
        (6, [2, 12, 4, 10, 61, 11]),
        (5, [2, 12, 4, 10, 11]),
    ],
)
def test_long_conversations_lose_their_earliest_turns_and_never_the_system_message(
    tokenizer: PreTrainedTokenizerBase, longest: int, ids: list[int]
) -> None:
    with_roles = copy.deepcopy(tokenizer)
    with_roles.chat_template = (
        "{{ '<bos>' }}{% for message in messages %}"
        "{{ {'system': ' w12 ', 'user': ' w10 ', 'assistant': ' '}[message.role] + message.content }}"
        "{% if message.role == 'user' %}{{ ' w11' }}{% endif %}{% endfor %}"
    )
    turns = [("system", "w4"), ("user", "w60"), ("assistant", "w5"), ("user", "w61")]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = PromptEncoder(with_roles, longest)({"prompt": messages})
    assert prompt.ids == ids
    assert prompt.cut_tokens == 10 - len(ids)
    assert prompt.messages == messages


def test_other_columns_are_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "w10", "answer": "42", "difficulty": 3}
    assert PromptEncoder(tokenizer, 9)(row).columns == {"answer": "42", "difficulty": 3}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"prompt": "a"}, {"text": "b"}], "row 2: the row has no 'prompt'; its columns: text"),
        ([{"prompt": []}], "row 1: prompt must be"),
        ([{"prompt": 3}], "row 1: prompt must be"),
        ([{"prompt": [{"content": "x"}]}], "'role' and 'content'"),
        ([{"prompt_ids": [4]}], "row 1: the row has no 'prompt'"),
        (
            [{"prompt": "a"}, {"prompt": "b", "chosen": "c"}],
            "row 2: .*'chosen'.*: remove the column",
        ),
        ({"train": [{"prompt": "a"}]}, r"splits \(train\); pass one of them"),
        (iter([{"prompt": "a"}]), "without streaming"),
        (["text"], "must be an object with its columns, but it is a text"),
        ([{"prompt": "a", 3: 1}], "the name of a column must be a text, but it is a number"),
        ([{"prompt": "a", "b": 10**5000}], "over 4,300 digits"),
        ([{"prompt": "a", "b": (("\ud83d",),)}], "'b' holds half of a character"),
    ],
)
def test_unusable_rows_are_refused_by_number(rows: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check_rows(rows)


def test_a_last_turn_that_is_too_long_loses_its_words_and_nothing_of_the_template(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    messages = [{"role": "user", "content": " ".join(f"w{i}" for i in range(20, 60))}]
    encode = PromptEncoder(tokenizer, 6)
    assert encode({"prompt": messages}).ids == [2, 10, 57, 58, 59, 11]
    assert encode({"prompt": messages}).cut_tokens == 37


def test_json_lines_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "x": 1}\n\n')
    assert read_rows(path) == [{"prompt": "a"}, {"prompt": "b", "x": 1}]
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(InvalidRequestError, match=r"rows\.jsonl, row 2: not JSON"):
        read_rows(path)
    path.write_text("[1]\n")
    with pytest.raises(InvalidRequestError, match=r"rows\.jsonl, row 1: the row must be an object"):
        read_rows(path)


def test_each_epoch_is_another_permutation_and_a_function_of_seed_and_position() -> None:
    order = PromptOrder(50, seed=1)
    first = [order.row(position) for position in range(50)]
    second = [order.row(position) for position in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert [PromptOrder(50, seed=1).row(position) for position in (73, 7)] == [second[23], first[7]]
    assert [PromptOrder(50, seed=2).row(position) for position in range(50)] != first


def test_the_collator_pads_prompts_left_and_completions_right() -> None:
    batch = DataCollatorForDAR(pad_token_id=9)(
        [
            {"prompt_ids": [1, 2, 3], "completion_ids": [4]},
            {"prompt_ids": [5], "completion_ids": [9, 7]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 9], [9, 9, 5, 9, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch["position_ids"][1].tolist() == [0, 0, 0, 1, 2]
    assert batch["completion_mask"].tolist() == [[True, False], [True, True]]
