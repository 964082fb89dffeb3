"""Columns of rows on their way to reward functions, reward services and chat templates."""

import copy
import datetime
import decimal
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState

from dar.errors import InvalidRequestError, RewardMisconfiguredError, TrainingError
from dar.protocol.reward_spec import Rewards
from dar.protocol.rows import ARGUMENTS
from dar.training import DARTrainer
from dar.training.from_spec import train_job
from dar.training.report.sink import NullControl
from dar.training.script.assembly import config_of
from dar.training.script.flags import read_command_line
from fakes.recording_sink import RecordingSink
from fakes.tiny_models import judge, save

URL = "http://127.0.0.1:9/score"
TWO = {
    "components": [
        {"name": "a", "kind": "http", "url": URL, "columns": ["extra"]},
        {"name": "b", "kind": "builtin", "fn": "length_penalty", "params": {"target": 3}},
    ]
}

# --- reward services ------------------------------------------------------------------------------


def refusal(value: object, rewards: Any, **options: Any) -> str | None:
    """What a trainer without a model says of a value; None: it would load the model."""
    rows = [{"prompt": "w10"}, {"prompt": "w10", "ground_truth": value, "extra": value}]
    arguments: dict[str, Any] = {"train_dataset": rows, "reward_funcs": rewards} | options
    try:
        DARTrainer("no/such-model", is_offline=True, **arguments)
    except InvalidRequestError as error:
        return str(error)
    except TrainingError as error:
        return None if "no/such-model" in str(error) else str(error)
    return "a model was found"


@pytest.mark.parametrize(
    "value",
    [b"x", decimal.Decimal("1.5"), {1}, torch.arange(3), object(), [b"x"], {"a": {1}}, 1j],
    ids=lambda value: type(value).__name__,
)
def test_what_json_cannot_carry_is_refused_before_the_model_is_loaded(value: object) -> None:
    message = refusal(value, URL)
    assert message is not None
    assert message.startswith("row 2: the column 'ground_truth' holds what JSON cannot carry")
    spec = refusal(value, Rewards.model_validate(TWO))
    assert spec is not None
    assert spec.startswith("row 2: the column 'ground_truth'")
    # a function in this process may take anything
    assert refusal(value, lambda completions, **columns: []) is None
    rows = [{"prompt": "w10"}]
    both = {"train_dataset": rows, "eval_dataset": [{"prompt": "w10", "ground_truth": value}]}
    said = refusal(value, [URL], **both)
    assert said is not None
    assert "row 1: the column 'ground_truth'" in said


@pytest.mark.parametrize("value", [float("nan"), np.float32("nan"), np.array([1, np.inf])])
def test_what_json_would_turn_into_null_is_refused(value: object) -> None:
    message = refusal(value, URL)
    assert message is not None
    assert message.startswith("row 2: the column 'ground_truth' holds ")
    assert "send null instead" in message


@pytest.mark.parametrize(
    "value",
    [
        *(None, 3, 2**70, 1.5, True, "x", [1, [2]], {"a": 1}, np.int64(3), np.arange(3)),
        *(datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC), uuid.UUID(int=5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_a_json_form_is_taken(value: object) -> None:
    assert refusal(value, URL) is None
    assert refusal(value, Rewards.model_validate(TWO)) is None


# --- reward functions -----------------------------------------------------------------------------


class Strict:
    def __call__(self, completions: list[str], *, label: list[str], level: int = 3) -> list[float]:
        return [0.0 for _ in completions]


def of_spec(**component: Any) -> Rewards:
    return Rewards.model_validate({"components": [{"name": "c", **component}]})


@pytest.mark.parametrize(
    ("rewards", "what"),
    [
        (lambda prompts, completions, label: [], "the reward function lambda needs"),
        ([lambda completions, **columns: [], Strict()], "the reward function strict needs"),
        (of_spec(url=URL, columns=["label"]), "the component 'c' needs"),
        (of_spec(kind="builtin", fn="contains", params={"column": "label"}), "the component 'c'"),
    ],
)
def test_a_column_that_no_row_has_is_named_before_the_model_is_loaded(
    rewards: Any, what: str
) -> None:
    lacking = refusal("x", rewards)
    assert lacking is not None
    assert f"no row has the column 'label', which {what}" in lacking
    assert lacking.endswith("the rows have: prompt, ground_truth, extra")
    rows = [{"prompt": "w10"}, {"prompt": "w11", "label": "a"}]
    assert refusal("x", rewards, train_dataset=rows) is None
    evaluated = refusal("x", rewards, train_dataset=rows, eval_dataset=rows[:1])
    assert evaluated is not None
    assert "no row has the column 'label'" in evaluated


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_column_has_the_name_of_an_argument_of_reward_functions(
    train: Callable[..., DARTrainer], name: str
) -> None:
    rows = [{"prompt": "w10"}, {"prompt": "w11", name: ["w20"]}]
    with pytest.raises(InvalidRequestError, match=f"row 2: .*'{name}'"):
        train(train_dataset=rows)


def test_a_reward_function_gets_the_trainers_state_as_in_trl(
    train: Callable[..., DARTrainer],
) -> None:
    seen: list[tuple[str, int, int]] = []

    def named(completions: list[str], trainer_state: TrainerState) -> list[float]:
        seen.append(("named", trainer_state.global_step, trainer_state.max_steps))
        return [float(len(text)) for text in completions]

    def any_columns(completions: list[str], **columns: Any) -> list[float]:
        state = columns["trainer_state"]
        seen.append(("any", state.global_step, state.max_steps))
        return [float(len(text)) for text in completions]

    train(reward_funcs=[named, any_columns], settings={"max_steps": 2})
    assert sorted(seen) == [(name, step, 2) for name in ("any", "named") for step in (0, 1)]


# --- chat templates -------------------------------------------------------------------------------

TEMPLATE = (
    "{% if word is defined %}{{ word + ' ' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ 'w10 ' + m.content + ' w11 ' }}"
    "{% else %}{{ m.content + ' <eos> ' }}{% endif %}{% endfor %}"
)
CHATS = [
    {"prompt": [{"role": "user", "content": "w20"}]},
    {"prompt": [{"role": "user", "content": "w21"}], "chat_template_kwargs": {"word": "w41"}},
]


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    """A tokenizer whose template shows the variable ``word``."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


def first_words(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(messages[0]["content"])) for messages in completions]


def prompts_of(sink: RecordingSink) -> set[str]:
    return {row.prompt for rows in sink.shown.values() for row in rows}


def test_variables_of_the_config_and_of_a_row_reach_the_template(
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    chatty: PreTrainedTokenizerBase,
) -> None:
    settings = {"max_steps": 1, "per_device_train_batch_size": 2}
    values = {"reward_funcs": first_words, "processing_class": chatty, "sink": sink}
    train(train_dataset=CHATS, settings=settings, **values)
    assert prompts_of(sink) == {"w10 w20 w11", "w41 w10 w21 w11"}
    settings |= {"chat_template_kwargs": {"word": "w40"}}
    train(train_dataset=CHATS, settings=settings, **values)
    assert prompts_of(sink) == {"w40 w10 w20 w11", "w41 w10 w21 w11"}


FAILING = {
    "overflow": ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError: integer division or modulo by zero"),
    "index": ("{{ '{}{}'.format(1) }}", "IndexError: "),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    "key": ("{{ {}['a'].b.c }}", "has no attribute 'a'"),
    "half a character": (r"{{ '\ud83d' }}w10", r"writes half a character \(U\+D83D\)"),
    "length": ("{{ 'w10 ' * 3000000 }}", "makes 12,000,000 characters of the conversation"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_named_before_the_first_step(
    name: str,
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    chatty: PreTrainedTokenizerBase,
) -> None:
    chatty.chat_template, why = FAILING[name]
    rows = [CHATS[0], {"prompt": [{"role": "user", "content": "w21"}]}]
    with pytest.raises(InvalidRequestError, match=f"row 1: the chat template of the model .*{why}"):
        train(train_dataset=rows, processing_class=chatty, sink=sink, reward_funcs=first_words)
    assert sink.phases == []


def test_a_reward_models_template_that_fails_ends_the_run(
    train: Callable[..., DARTrainer], chatty: PreTrainedTokenizerBase
) -> None:
    broken = copy.deepcopy(chatty)
    broken.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(RewardMisconfiguredError, match=r"the reward model .*: ZeroDivisionError"):
        train(
            train_dataset=CHATS,
            processing_class=chatty,
            reward_funcs=None,
            reward_model=judge(),
            reward_processing_class=broken,
        )


def test_variables_that_a_table_fills_with_null_count_as_absent(
    train: Callable[..., DARTrainer], sink: RecordingSink, chatty: PreTrainedTokenizerBase
) -> None:
    rows = Dataset.from_list(
        [
            {**CHATS[0], "chat_template_kwargs": {"word": None, "other": True}},
            {**CHATS[1], "chat_template_kwargs": {"word": "w41", "other": None}},
        ]
    )
    settings = {"max_steps": 1, "per_device_train_batch_size": 2}
    values = {"reward_funcs": first_words, "processing_class": chatty, "sink": sink}
    train(train_dataset=rows, settings=settings, **values)
    assert prompts_of(sink) == {"w10 w20 w11", "w41 w10 w21 w11"}


def test_variables_reach_the_template_offline_too(
    replay: Callable[..., Any], sink: RecordingSink, chatty: PreTrainedTokenizerBase
) -> None:
    rows = [{**row, "completions": ["w30", "w31"], "rewards": [1, 0]} for row in CHATS]
    settings = {"chat_template_kwargs": {"word": "w40"}, "max_steps": 1}
    replay(rows, sink=sink, processing_class=chatty, settings=settings)
    assert prompts_of(sink) == {"w40 w10 w20 w11", "w41 w10 w21 w11"}


def test_variables_of_a_job_reach_the_template(
    job_inputs: Callable[..., Any],
    sink: RecordingSink,
    base: Path,
    chatty: PreTrainedTokenizerBase,
) -> None:
    chatty.save_pretrained(base)
    rewards = {
        "components": [
            {"name": "b", "kind": "builtin", "fn": "length_penalty", "params": {"target": 3}}
        ]
    }
    dar = {"rewards": rewards, "chat_template_kwargs": {"word": "w40"}}
    train_job(job_inputs(dar, rows=CHATS, steps=1), sink, NullControl())
    assert prompts_of(sink) <= {"w40 w10 w20 w11", "w41 w10 w21 w11"}
    assert prompts_of(sink)


def test_variables_of_the_config_reach_the_template_of_a_reward_model(
    train: Callable[..., DARTrainer], chatty: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """As in TRL."""
    folder = save(judge(), tmp_path / "judge")
    chatty.save_pretrained(folder)
    rewards = []
    for word in ("w40", "w50"):
        sink = RecordingSink()
        train(
            train_dataset=CHATS[:1] * 3,
            processing_class=without_variables(chatty),
            reward_funcs=None,
            reward_model=str(folder),
            sink=sink,
            settings={"max_steps": 1, "chat_template_kwargs": {"word": word}},
        )
        rewards.append([row.reward for row in sink.shown[1]])
    assert rewards[0] != rewards[1]


def without_variables(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE.replace("word is defined", "false")
    return made


def test_variables_without_any_conversation_are_refused(train: Callable[..., DARTrainer]) -> None:
    with pytest.raises(InvalidRequestError, match="no row holds a conversation") as caught:
        train(settings={"chat_template_kwargs": {"word": "w40"}})
    assert caught.value.param == "chat_template_kwargs"


def test_variables_are_json_on_a_command_line(tmp_path: Path) -> None:
    variables = {"enable_thinking": False, "depth": [1, 2]}
    flags = ["--model_name_or_path=m", "--dataset_name=d", f"--output_dir={tmp_path}"]
    line = read_command_line([*flags, f"--chat_template_kwargs={json.dumps(variables)}"])
    assert config_of(line.config).template_variables == variables
    file = tmp_path / "run.yaml"
    file.write_text("chat_template_kwargs:\n  enable_thinking: false\n  depth: [1, 2]\n")
    line = read_command_line([*flags, f"--config={file}"])
    assert config_of(line.config).template_variables == variables
