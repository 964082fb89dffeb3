"""Uploads, `dar.DARTrainer` and `dar train` accept the same rows and reject others alike."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub.utils import logging as hub_logging

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.rows import KINDS
from dar.training import DARTrainer
from dar.training.script.main import main
from fakes.live_service import Live

OK = None
"""The rows are accepted."""
Case = tuple[str | bytes, tuple[int, str] | None]
ROWS = '{"prompt": "hi \u2028 there", "a": 1}\n{"prompt": "yes no", "a": 2}\n'
USER = {"role": "user", "content": "hi"}


def talk(*messages: object) -> str:
    return json.dumps({"prompt": list(messages)})


def column(value: str) -> str:
    return '{"prompt": "hi"}\n{"prompt": "hi", "a": ' + value + "}"


def scored(**values: object) -> str:
    return json.dumps({"prompt": "a", "completions": ["b", "c"], "rewards": [1, 0]} | values)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
FILES: dict[str, Case] = {
    # as tools of Windows write them, and other texts that are not JSON Lines
    "U+2028 in a text": (ROWS, OK),
    "CRLF": (ROWS.replace("\n", "\r\n"), OK),
    "CR alone": (ROWS.replace("\n", "\r"), (1, "not JSON: Extra data")),
    "BOM": ("\ufeff" + ROWS, (1, "byte order mark")),
    "BOM and CRLF": ("\ufeff" + ROWS.replace("\n", "\r\n"), (1, "byte order mark")),
    "UTF-16": (ROWS.encode("utf-16"), (1, "byte 1 is not UTF-8")),
    "Latin-1": ('{"prompt": "caf\xe9"}'.encode("latin-1"), (1, "byte 16 is not UTF-8")),
    "an array": (
        json.dumps([{"prompt": "a"}]),
        (1, "must be an object with its columns, but it is a list"),
    ),
    "a text": ('"prompt"', (1, "must be an object with its columns, but it is a text")),
    "trailing comma": (ROWS.replace("}\n", "},\n"), (1, "not JSON: Extra data at character")),
    "cut off": (ROWS[:-4], (2, "not JSON")),
    "nothing": ("", (0, "the file has no rows")),
    "blank lines alone": ("\n \n\n", (0, "the file has no rows")),
    "a blank line at the end": (ROWS + "\n \n", OK),
    "a blank line between rows": (ROWS + "\n" + ROWS, (3, "the row is blank")),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', (1, "'prompt' occurs twice")),
    "a key twice, deeper": (column('[{"b": 1, "b": 1}]'), (2, "'b' occurs twice")),
    # values
    "NaN": (column("NaN"), (2, "the column 'a' holds nan")),
    "Infinity, deeper": (column('[{"b": -Infinity}]'), (2, "the column 'a' holds -inf")),
    "too large for a float": (column("1e999"), (2, "1e999 is too large")),
    "an integer of 5,000 digits": (column("1" * 5000), (2, "'a' holds an integer of over 4,300")),
    "an integer of 100 digits": (column("1" * 100), OK),
    "3,000 levels": (column("[" * 3000 + "]" * 3000), (2, "'a' is nested over 64 levels")),
    "900 levels": (column("[" * 900 + "]" * 900), (2, "'a' is nested over 64 levels")),
    "65 levels of objects": (
        column('{"b":' * 65 + "1" + "}" * 65),
        (2, "'a' is nested over 64 levels"),
    ),
    "64 levels": (column("[" * 64 + "]" * 64), OK),
    "half a character in a prompt": ('{"prompt": "hi \\ud83d"}', (1, "'prompt' holds half of a")),
    "half a character in a column": (column('["\\ud83d"]'), (2, "'a' holds half of a character")),
    "half a character in a key": (column('{"\\ud83d": 1}'), (2, "'a' holds half of a character")),
    "a whole character in two halves": (column('"\\ud83d\\ude00"'), OK),
    "NUL in a text": ('{"prompt": "hi\\u0000there"}', OK),
    # columns
    "half a character in a name": ('{"prompt": "a", "\\udc00": 1}', (1, "holds NUL or half of")),
    "NUL in a name": ('{"prompt": "a", "b\\u0000": 1}', (1, "holds NUL or half of a")),
    "a long name": (json.dumps({"prompt": "a", "n" * 257: 1}), (1, "has 257 characters, but")),
    "257 columns": (
        json.dumps({"prompt": "a", **dict.fromkeys(map(str, range(256)), 1)}),
        (1, "more than 256 different columns"),
    ),
    "257 columns in all": (
        "\n".join(json.dumps({"prompt": "a", f"c{i}": 1}) for i in range(256)),
        (256, "more than 256 different columns"),
    ),
    "prompts": ('{"prompts": "a"}', (1, "'prompts' has the name of an argument")),
    "trainer_state": ('{"prompt": "a", "trainer_state": 1}', (1, "'trainer_state' has the name")),
    "tools": ('{"prompt": "a", "tools": []}', (1, "nothing here executes tools")),
    "tools that are null": ('{"prompt": "a", "tools": null}', OK),
    "template variables": ('{"prompt": "a", "chat_template_kwargs": {"x": [1]}}', OK),
    "no template variables": (
        '{"prompt": "a", "chat_template_kwargs": "x"}',
        (1, "chat_template_kwargs must be an object with the variables"),
    ),
    "a template variable of the trainer": (
        '{"prompt": "a", "chat_template_kwargs": {"tokenize": true}}',
        (1, "has 'tokenize', which is not a variable"),
    ),
    "tools among the template variables": (
        '{"prompt": "a", "chat_template_kwargs": {"tools": [1]}}',
        (1, "nothing here executes tools"),
    ),
    # prompts
    "no prompt": ('{"text": "a"}', (1, "no 'prompt'; its columns: text")),
    "a prompt that is null": ('{"prompt": null}', (1, "the prompt is null")),
    "an empty prompt": ('{"prompt": ""}', (1, "the prompt is empty")),
    "an empty list": ('{"prompt": []}', (1, "prompt must be a text or a list of messages")),
    "a number": ('{"prompt": 3}', (1, "but it is a number")),
    "an object": ('{"prompt": {"role": "user", "content": "a"}}', (1, "but it is an object")),
    "a conversation": (talk(USER), OK),
    "a message with a column that is null": (talk({**USER, "name": None}), OK),
    "a message with another key": (
        talk({**USER, "name": "x"}),
        (1, "exactly 'role' and 'content'"),
    ),
    "a message without content": (talk({"role": "user"}), (1, "prompt[0] has no content")),
    "a message without role": (talk({"content": "a"}), (1, "exactly 'role' and 'content'")),
    "a message that is a text": (talk(USER, "a"), (1, "prompt[1] must be a message")),
    "an unknown role": (talk({**USER, "role": "king"}), (1, "prompt[0].role must be one of")),
    "a role that is a list": (talk({**USER, "role": ["user"]}), (1, "role must be one of")),
    "content of parts": (
        talk({**USER, "content": [{"type": "text", "text": "a"}]}),
        (1, "prompt[0].content must be a text, but it is a list"),
    ),
    "content that is a number": (talk({**USER, "content": 3}), (1, "but it is a number")),
    "content that is null": (talk({**USER, "content": None}), (1, "prompt[0] has no content")),
    "content that is empty": (talk({**USER, "content": ""}), (1, "a text that is not empty")),
    "tool calls": (
        talk(USER, {"role": "assistant", "content": "a", "tool_calls": [{}]}),
        (1, "prompt[1] has tool_calls, but nothing here executes tools"),
    ),
    # completions
    "completions": (scored(), OK),
    "rewards that are missing": (scored(rewards=[1, None]), OK),
    "a reward that is NaN": (scored(rewards=[1, float("nan")]), OK),
    "a reward of 1e6": (scored(rewards=[1e6, -1e6]), OK),
    "a reward of 1e9": (scored(rewards=[1e9, 1e9 + 1]), (1, "must lie within ±1,000,000")),
    "a reward of 1e39": (scored(rewards=[0, 1e39]), (1, "must lie within ±1,000,000")),
    "a reward of 400 digits": (scored(rewards=[0, 10**400]), (1, "must lie within ±1,000,000")),
    "a reward that is a text": (scored(rewards=["1", 0]), (1, "must be numbers or null")),
    "a reward that is a boolean": (scored(rewards=[True, 0]), (1, "must be numbers or null")),
    "too few rewards": (scored(rewards=[1]), (1, "needs 2 rewards")),
    "no rewards": ('{"prompt": "a", "completion": "b"}', (1, "completions but no rewards")),
    "probabilities": (scored(behavior_logps=[-1, 0]), OK),
    "a probability above 1": (scored(behavior_logps=[-1, 0.5]), (1, "must be at most 0")),
    "a probability of NaN": (scored(behavior_logps=[-1, float("nan")]), (1, "finite numbers")),
    "half a character in a completion": (
        '{"prompt": "a", "completion": "\\ud83d", "reward": 1}',
        (1, "'completion' holds half of a character"),
    ),
    "two formats in a row": (scored(chosen="c"), (1, "keep the columns of one format")),
    "a completion in messages": (
        json.dumps({"prompt": [USER], "completions": [[USER], "c"], "rewards": [1, 0]}),
        (1, "completions mixes texts and messages"),
    ),
    "a completion of the user": (
        json.dumps({"prompt": [USER], "completions": [[USER]], "reward": 1}),
        (1, "completions[0] must hold one message of the assistant"),
    ),
    "a completion of parts": (
        json.dumps(
            {
                "prompt": [USER],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
                "reward": 1,
            }
        ),
        (1, "completion[0].content must be a text, but it is a list"),
    ),
    "token ids": ('{"prompt_ids": [1], "completion_ids": [2], "reward": 1}', OK),
    "token ids that are booleans": (
        '{"prompt_ids": [1], "completion_ids": [true], "reward": 1}',
        (1, "must be a list of token ids"),
    ),
    "negative token ids": (
        '{"prompt_ids": [-1], "completion_ids": [2], "reward": 1}',
        (1, "must be a list of token ids"),
    ),
    "preferences": (json.dumps(PAIR), OK),
    "equal preferences": (
        json.dumps(PAIR | {"rejected": "b"}),
        (1, "chosen and rejected are the same"),
    ),
    "an empty preference": (
        json.dumps(PAIR | {"rejected": ""}),
        (1, "rejected is empty after the prompt"),
    ),
    "rewards that are all null": (
        scored(rewards=[None, None]),
        (0, "every reward is null"),
    ),
    "half a preference": ('{"prompt": "a", "chosen": "b"}', (1, "'chosen' but no 'rejected'")),
    # formats of several rows
    "prompts, then completions": (
        '{"prompt": "a"}\n{"prompt": "a", "completion": "b"}',
        (2, "row 1 has no completions: remove the column"),
    ),
    "completions, then prompts": (
        scored() + '\n{"prompt": "a"}',
        (2, "no completions, but row 1 has 'completions'"),
    ),
    "completions, then preferences": (
        scored() + "\n" + json.dumps(PAIR),
        (2, "has chosen, rejected, but row 1 has completions, rewards"),
    ),
    "probabilities in one row": (
        scored() + "\n" + scored(behavior_logps=[-1, -2]),
        (2, "behavior_logps, rewards, but row 1 has completions, rewards"),
    ),
    "a user's reward column in one prompt": ('{"prompt": "a"}\n{"prompt": "a", "reward": 1}', OK),
}
HIDDEN = (
    *("a key twice", "a key twice, deeper"),
    *("a blank line between rows", "CR alone", "too large for a float"),
)
"""Files whose fault a list of rows no longer shows, once Python's parser has read it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, in which `dar train` may not call the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAR_IS_OFFLINE", "true")
    (tmp_path / "judge.py").write_text("def short(prompts, completions, **columns): ...\n")
    levels = transformers.utils.logging.get_verbosity(), hub_logging.get_verbosity()
    yield tmp_path
    transformers.utils.logging.set_verbosity(levels[0])
    hub_logging.set_verbosity(levels[1])
    logging.getLogger("dar").handlers.clear()


Verdict = tuple[int, str] | None


def of_upload(live: Live, content: bytes) -> Verdict:
    answer = live.upload(content)
    if answer.status_code == 200:
        return OK
    first = answer.json()["error"]["errors"][0]
    return first.get("row", 0), first["message"]


def of_trainer(rows: list[Any]) -> Verdict:
    """Of a trainer without a model: rows are checked first."""
    is_offline = isinstance(rows[0], dict) and bool(KINDS.keys() & rows[0].keys())
    reward = None if is_offline else lambda prompts, completions, **columns: []
    try:
        DARTrainer("no/such-model", None, rows, reward, is_offline=True)
    except InvalidRequestError as error:
        if not str(error).startswith("row "):
            return 0, str(error)
        row, _, message = str(error).removeprefix("row ").partition(": ")
        return int(row), message
    except TrainingError as error:
        return OK if "no/such-model" in str(error) else (0, str(error))
    return 0, "a model was found"


def of_script(path: Path, capsys: pytest.CaptureFixture[str]) -> Verdict:
    """Of a run without a model: rows are read first."""
    capsys.readouterr()
    arguments = {"model_name_or_path": "no/such-model", "dataset_name": path, "output_dir": "out"}
    assert main([f"--{name}={value}" for name, value in arguments.items()]) == 64
    said = capsys.readouterr().err.splitlines()[0].removeprefix(f"dar train: {path.name}")
    if "no/such-model" in said:
        return OK
    if not said.startswith(", row "):
        return 0, said.removeprefix(": ")
    row, _, message = said.removeprefix(", row ").partition(": ")
    return int(row), message


GROUPS = ("texts", "values", "columns", "prompts", "completions", "formats")
STARTS = dict(
    zip(
        ("U+2028 in a text", "NaN", "half a character in a name", "no prompt", "completions",
         "prompts, then completions"),
        GROUPS,
        strict=True,
    )
)  # fmt: skip


def of_group(wanted: str) -> Iterator[str]:
    group = ""
    for name in FILES:
        group = STARTS.get(name, group)
        if group == wanted:
            yield name


@pytest.mark.parametrize("group", GROUPS)
def test_every_entrance_says_the_same_of_a_row(
    live: Live, folder: Path, capsys: pytest.CaptureFixture[str], group: str
) -> None:
    for name in of_group(group):
        text, expected = FILES[name]
        content = text if isinstance(text, bytes) else text.encode()
        verdict = of_upload(live, content)
        if expected is None:
            assert verdict is OK, name
        else:
            assert verdict is not None, name
            assert (verdict[0], expected[1] in verdict[1]) == (expected[0], True), (name, verdict)
        (folder / "rows.jsonl").write_bytes(content)
        said = of_script(folder / "rows.jsonl", capsys)
        assert is_same(said, verdict), (name, said, verdict)
        rows = rows_of(content)
        if rows and name not in HIDDEN:
            said = of_trainer(rows)
            assert is_same(said, verdict), (name, said, verdict)


def is_same(one: Verdict, other: Verdict) -> bool:
    """Whether row and message are equal; after it, a file's error may count further rows."""
    if one is None or other is None:
        return one is other
    counted = one[1].split(" rows are wrong, see errors)")[0].rpartition(" (")[0] or one[1]
    return one[0] == other[0] and other[1] in (one[1], counted)


def rows_of(content: bytes) -> list[Any] | None:
    """The rows as Python's own parser reads them; None: it cannot."""
    try:
        return [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return None


def test_a_json_file_of_a_script_is_read_by_the_same_rules(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "rows.json"
    for content, expected in (
        ('[{"prompt": "a"},\n {"prompt": "b"}]', OK),
        (ROWS, OK),
        ('[{"prompt": "a"}, {"prompt": ""}]', (2, "the prompt is empty")),
        ('[{"prompt": "a"}, {"prompt": "a", "prompt": "b"}]', (2, "'prompt' occurs twice")),
        ("[]", (0, "the file has no rows")),
    ):
        path.write_text(content)
        verdict = of_script(path, capsys)
        if expected is None:
            assert verdict is OK
        else:
            assert verdict is not None
            assert verdict[0] == expected[0]
            assert expected[1] in verdict[1]


def test_a_learning_rate_of_0_is_refused_by_jobs_and_scripts(
    live: Live, folder: Path, capsys: pytest.CaptureFixture[str], error_of: Callable[..., Any]
) -> None:
    spec = live.spec(dar={"hyperparameters": {"learning_rate": 0, "max_steps": 1}})
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))
    assert error["param"] == "method.dar.hyperparameters.learning_rate"
    command = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o", "--learning_rate=0"]
    assert main(command) == 64
    assert "learning_rate is 0.0, but must be a number, above 0" in capsys.readouterr().err


def test_template_variables_of_a_job_are_checked_when_it_is_submitted(
    live: Live, error_of: Callable[..., Any]
) -> None:
    variables = {"enable_thinking": False}
    job = live.submit(dar={"chat_template_kwargs": variables})
    assert job["method"]["dar"]["chat_template_kwargs"] == variables
    assert live.claim().body["spec"]["method"]["dar"]["chat_template_kwargs"] == variables
    assert "chat_template_kwargs" not in live.submit()["method"]["dar"]
    for wrong, says in (
        ({"tokenize": True}, "'tokenize', which is not a variable"),
        ({"tools": []}, "nothing here executes tools"),
        ("x", ""),
    ):
        spec = live.spec(dar={"chat_template_kwargs": wrong})
        error = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))
        assert error["param"] == "method.dar.chat_template_kwargs"
        assert says in error["message"]
