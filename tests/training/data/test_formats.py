"""Data formats, through the trainer: every way to write a row trains as the same row of token ids
does.
"""

import datetime
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from dar.errors import InvalidRequestError
from dar.protocol.rows import RowError, check_format, read_offline
from dar.training import DARTrainer
from dar.training.data.rows import check_rows
from fakes.recording_sink import RecordingSink

Rows = list[dict[str, Any]]


def user(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TEXT_TOKENS = [
    {"prompt_ids": [2, 10, 20], "completion_ids": [[30, 3], [40, 41, 3]], "rewards": [1.0, 0.0]},
    {"prompt_ids": [2, 10], "completion_ids": [[31, 32, 3], [42, 3]], "rewards": [1.0, 0.0]},
]
TEXTS: dict[str, Rows] = {
    "preference": [
        {"prompt": "w10 w20", "chosen": " w30", "rejected": " w40 w41"},
        {"prompt": "w10", "chosen": " w31 w32", "rejected": " w42"},
    ],
    "implicit prompt": [
        {"chosen": "w10 w20 w30", "rejected": "w10 w20 w40 w41"},
        {"chosen": "w10 w31 w32", "rejected": "w10 w42"},
    ],
    "list": [
        {"prompt": "w10 w20", "completion": [" w30", " w40 w41"], "rewards": [1.0, 0.0]},
        {"prompt": "w10", "completion": [" w31 w32", " w42"], "rewards": [1.0, 0.0]},
    ],
    "ended already, and a text that would be merged with its prompt": [
        {"prompt": "w10 w20", "completions": ["w30 <eos>", "w40 w41"], "reward": [1, 0]},
        {"prompt": "<bos> w10", "completions": ["w31 w32", " w42 <eos>"], "reward": [1, 0]},
    ],
}
TALK_TOKENS = [
    {"prompt_ids": [2, 10, 20, 11], "completion_ids": [[30, 3], [40, 3]], "rewards": [1.0, 0.0]},
    {
        "prompt_ids": [2, 10, 21, 11, 22, 3, 2, 10, 23, 11],
        "completion_ids": [[31, 3], [41, 3]],
        "rewards": [1.0, 0.0],
    },
]
TALK = (user("w20"), user("w21", "w22", "w23"))
TALKS: dict[str, Rows] = {
    "preference": [
        {"prompt": TALK[0], "chosen": says("w30"), "rejected": says("w40")},
        {"prompt": TALK[1], "chosen": says("w31"), "rejected": says("w41")},
    ],
    "implicit prompt": [
        {"chosen": TALK[0] + says("w30"), "rejected": TALK[0] + says("w40")},
        {"chosen": TALK[1] + says("w31"), "rejected": TALK[1] + says("w41")},
    ],
    "prompt repeated": [
        {"prompt": talk, "chosen": talk + says(good), "rejected": talk + says(bad)}
        for talk, good, bad in zip(TALK, ("w30", "w31"), ("w40", "w41"), strict=True)
    ],
    "prompt repeated as a text": [
        {"prompt": text, "chosen": talk + says(good), "rejected": talk + says(bad)}
        for text, talk, good, bad in zip(
            ("w20", "w23"), TALK, ("w30", "w31"), ("w40", "w41"), strict=True
        )
    ],
    "list of messages": [
        {"prompt": TALK[0], "completion": [says("w30"), says("w40")], "rewards": [1.0, 0.0]},
        {"prompt": TALK[1], "completion": [says("w31"), says("w41")], "rewards": [1.0, 0.0]},
    ],
    "list of texts": [
        {"prompt": TALK[0], "completions": ["w30", "w40"], "rewards": [1.0, 0.0]},
        {"prompt": TALK[1], "completions": ["w31", "w41"], "rewards": [1.0, 0.0]},
    ],
}
SINGLE_TOKENS = [
    {"prompt_ids": [2, 10], "completion_ids": [30, 3], "reward": 2.0, "behavior_logps": -3.0},
    {"prompt_ids": [2, 11], "completion_ids": [[31, 3]], "reward": 0.5, "behavior_logps": -4.0},
]
SINGLES: dict[str, Rows] = {
    "text": [
        {"prompt": "w10", "completion": " w30", "reward": 2.0, "behavior_logps": -3.0},
        {"prompt": "w11", "completion": " w31", "reward": 0.5, "behavior_logps": -4.0},
    ],
    "lists of one": [
        {"prompt": "w10", "completions": ["w30"], "rewards": [2.0], "behavior_logps": [-3.0]},
        {"prompt": "w11", "completions": ["w31"], "rewards": [0.5], "behavior_logps": [-4.0]},
    ],
}
CASES = [
    pytest.param(rows, tokens, id=f"{family}: {name}")
    for family, forms, tokens in (
        ("texts", TEXTS, TEXT_TOKENS),
        ("conversations", TALKS, TALK_TOKENS),
        ("single", SINGLES, SINGLE_TOKENS),
    )
    for name, rows in forms.items()
]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("rows", "tokens"), CASES)
def test_every_format_trains_as_its_token_ids_do(
    replay: Callable[..., dict[str, torch.Tensor]], rows: Rows, tokens: Rows
) -> None:
    assert_same(replay(rows), replay(tokens))


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        (TALKS["implicit prompt"], TALK_TOKENS),
        (TEXTS["list"], TEXT_TOKENS),
        (TEXT_TOKENS, TEXT_TOKENS),
    ],
)
def test_tables_of_the_datasets_library_are_data_sets(
    replay: Callable[..., dict[str, torch.Tensor]], rows: Rows, tokens: Rows
) -> None:
    table = Dataset.from_list([{**row, "note": None} for row in rows])
    assert_same(replay(table), replay(tokens))
    assert_same(replay(table.with_format("numpy")), replay(tokens))


def test_rows_may_hold_different_numbers_of_completions(
    replay: Callable[..., Any], sink: RecordingSink
) -> None:
    rows = [
        {"prompt": "w10", "completions": ["w20", "w21", "w22"], "rewards": [3.0, 0.0, None]},
        {"prompt": "w11", "completions": ["w23", "w24"], "rewards": [1.0, math.nan]},
        {"prompt": "w12", "completions": ["w25", "w26"], "rewards": [1.0, 5.0]},
    ]
    replay(rows, sink=sink, settings={"max_steps": 1, "per_device_train_batch_size": 3})
    shown = {row.completion: row.advantage for row in sink.shown[1] if row.weight is not None}
    # leave-one-out: each is compared with the mean of its scored siblings; w23 has none
    assert shown == {"w20": 3, "w21": -3, "w25": -4, "w26": 4}
    assert sink.reports[1]["rewards/missing_fraction"] == pytest.approx(2 / 7)


def test_rows_of_one_completion_learn_from_their_rewards(
    replay: Callable[..., Any], sink: RecordingSink
) -> None:
    rows = [
        {"prompt": "w10", "completion": "w20", "reward": 1.0},
        {"prompt": "w11", "completion": "w21", "reward": 0.0},
    ]
    replay(rows, sink=sink)
    weights = {row.completion: row.weight for row in sink.shown[1]}
    assert weights["w20"] > 1 > weights["w21"]
    with pytest.raises(InvalidRequestError, match="nothing can be compared"):
        replay(rows, settings={"per_device_train_batch_size": 1})


def test_extra_columns_reach_reward_functions_once_per_completion(
    train: Callable[..., DARTrainer],
) -> None:
    seen: dict[str, list[Any]] = {}

    def score(completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [float(len(text)) for text in completions]

    rows = [
        {"prompt": "w10", "answer": "a", "notes": ["x", "y"], "reward": 1},
        {"prompt": "w20", "answer": None, "notes": [], "reward": 2},
    ]
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "dar_k": 3}
    train(train_dataset=rows, reward_funcs=score, settings=settings)
    order = [0, 0, 0, 1, 1, 1] if seen["prompts"][0] == "w10" else [1, 1, 1, 0, 0, 0]
    for name in ("answer", "notes", "reward"):
        assert seen[name] == [rows[row][name] for row in order]


# --- what is refused ------------------------------------------------------------------------------

SINGLE = {"prompt": "w10", "completion": "w20", "reward": 1.0}
GOOD = {"prompt": "w10", "completions": ["w20", "w21"], "rewards": [1.0, 0.0]}


@pytest.mark.parametrize("boxed", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_rewards_in_arrays_without_dimensions_are_numbers(boxed: Callable[..., Any]) -> None:
    """As `datasets.Dataset.with_format` gives them."""
    for value, expected in ((0.5, 0.5), (2, 2.0), (float("nan"), None)):
        row = {**SINGLE, "reward": boxed(value), "behavior_logps": boxed(-1.5)}
        found = read_offline(row)
        assert (found.rewards, found.behavior_logps) == ([expected], [-1.5])
    for column in ("reward", "behavior_logps"):
        for odd in (boxed(True), np.timedelta64(1, "s"), np.timedelta64(1, "ns")):
            with pytest.raises(InvalidRequestError, match=f"{column} must be"):
                read_offline({**SINGLE, column: odd})
    pair = read_offline({**GOOD, "rewards": [boxed(1.0), boxed(0.0)]})
    assert pair.rewards == [1.0, 0.0]


@pytest.mark.parametrize(
    ("start", "chosen", "rejected"),
    [
        ("日本", "か\u3099", "かな"),
        ("x", " \U0001f44d\U0001f3fd", " \U0001f44d\U0001f3ff"),
        ("日", "本\ufe00", "本x"),
        ("日本", "\U0001f469\u200d\U0001f467", "\U0001f469 b"),
        ("日本", "\U0001f1e9\U0001f1ea", "\U0001f1e9\U0001f1f0"),
        ("日本", "가\u11a8", "가나"),
        ("日本", "\u1100\u1161", "\u1100\u1162"),
        ("日", "ハ\uff9f", "ハ\uff9e"),
        ("a", " >\u0338b", " >c"),
        ("日本", "か b", "か c"),
    ],
)
def test_a_prompt_that_a_pair_shares_ends_with_a_whole_character(
    start: str, chosen: str, rejected: str
) -> None:
    found = read_offline({"chosen": start + chosen, "rejected": start + rejected})
    ends_later = chosen.startswith("か ")
    assert found.prompt == (start + "か" if ends_later else start)
    assert found.completions == ([" b", " c"] if ends_later else [chosen, rejected])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w10"}, "no completions, but row 1 has 'completions'"),
        ({**GOOD, "chosen": "w4", "rejected": "w5"}, "keep the columns of one format"),
        ({**GOOD, "rewards": [1.0]}, "needs 2 rewards, one for each completion"),
        ({**GOOD, "rewards": 1.0}, "needs 2 rewards"),
        ({**GOOD, "rewards": [True, False]}, "must be numbers or null"),
        ({**GOOD, "reward": 1.0}, "both 'reward' and 'rewards'"),
        ({**GOOD, "completion": "w20"}, "both 'completion' and 'completions'"),
        ({**GOOD, "completions": ["w20", says("w21")]}, "mixes texts and messages"),
        ({**GOOD, "completions": [says("w20"), says("w21")]}, "prompt is a text, but completions"),
        ({**GOOD, "completions": []}, "completions must be a text"),
        ({**GOOD, "completions": 3}, "it is a number"),
        ({**GOOD, "prompt_ids": [4]}, "'prompt_ids' go with 'completion_ids'"),
        ({**GOOD, "prompt": user("w4"), "completions": [user("w4")] * 2}, "holds: user"),
        ({**GOOD, "behavior_logps": [-1.0]}, "needs 2 behavior_logps"),
        ({**GOOD, "behavior_logps": [-1.0, -2.0]}, "but row 1 has completions, rewards: keep to"),
        ({"prompt": "w1", "completions": ["w2"]}, "completions but no rewards"),
        ({"chosen": "w10 w20"}, "'chosen' but no 'rejected'"),
        ({"chosen": "w10", "rejected": "w20"}, "no common beginning"),
        ({"chosen": user("w1"), "rejected": user("w2")}, "no common first message"),
        ({"chosen": "w10", "rejected": user("w2")}, "one of chosen and rejected is a text"),
        ({"chosen": "w1 w2", "rejected": "w1 w3", "reward": 1}, "remove the column 'reward'"),
        ({"prompt": "w1", "chosen": "w2", "rejected": "w3"}, "row 1 has completions, rewards"),
        ({"completions": ["w2", "w3"], "rewards": [1, 0]}, "no 'prompt'"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_before_a_model_is_loaded(
    row: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"row 2: .*{message}") as caught:
        DARTrainer("no/such-model", train_dataset=[GOOD, row], is_offline=True)
    assert caught.value.param == "training_file"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": b"hi"}, "it is of the type bytes"),
        ({"prompt": {"hi"}}, "it is of the type set"),
        ({"prompt": datetime.date(2026, 1, 1)}, "it is of the type date"),
        ({"prompt": (one for one in "ab")}, "it is of the type generator"),
        ({"prompt": np.True_}, "it is of the type bool"),
        ({"prompt": True}, "it is a boolean"),
        ({"prompt": np.float32(1)}, "it is a number"),
        ({**SINGLE, "reward": True}, "reward must be a number or null, not True"),
        ({**SINGLE, "reward": "1"}, "reward must be a number or null, not '1'"),
        ({**SINGLE, "reward": Decimal(1)}, r"reward must be a number or null, not Decimal\('1'\)"),
        ({**SINGLE, "reward": np.array("x")}, "reward must be a number or null, not 'x'"),
        ({**SINGLE, "behavior_logps": "x"}, "behavior_logps must be a number or null, not 'x'"),
    ],
)
def test_a_value_of_another_type_is_called_by_its_type(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        check_format(row)


def test_options_of_sampling_that_cannot_matter_are_named(
    train: Callable[..., DARTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"preset": "paper", "dar_k": 7, "stop": ["x"], "max_new_tokens": 128}
    train(train_dataset=[GOOD], reward_funcs=None, settings={"max_steps": 2} | settings)
    told = [record.getMessage() for record in caplog.records if "without effect" in record.message]
    assert [message.partition(":")[0] for message in told] == ["dar_k, stop"]


@pytest.mark.parametrize("column", ["completion", "completions", "completion_ids", "chosen"])
def test_completions_beside_a_reward_source_are_refused(
    train: Callable[..., DARTrainer], column: str
) -> None:
    rows = [{"prompt": "w10"}, {"prompt": "w11", column: ["w20"]}]
    with pytest.raises(InvalidRequestError, match=f"row 2: .*'{column}'.*remove the column"):
        train(train_dataset=rows)


def test_the_rows_of_the_guide_are_what_it_says() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "guide.md").read_text()
    section = guide.partition("## Data formats")[2].partition("\n## ")[0]
    table = re.findall(r"^\| [^|]+ \| (online|offline).*\| `(\{.*\})` \|$", section, re.MULTILINE)
    assert [kind for kind, _ in table] == ["online"] + ["offline"] * 4
    block = re.findall(r"^```json\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[0]
    talks = [json.loads(row) for row in re.sub(r"\n ", " ", block).splitlines()]
    assert len(talks) == 3
    check_rows([json.loads(table[0][1])])
    for row in [*(json.loads(text) for _, text in table[1:]), *talks]:
        check_rows([row], is_replay=True)
