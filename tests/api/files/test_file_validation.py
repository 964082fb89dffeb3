"""What is found in a stored training file."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dar import Client
from fakes.live_service import Live


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.key("api_key"), live.url) as client:
        yield client


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def install_tokenizer(live: Live, name: str) -> None:
    """A model whose tokens are the words between spaces."""
    made = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = live.settings.home / "models" / name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    made.save(str(folder / "tokenizer.json"))


def test_columns_and_lengths_of_prompts_are_found(live: Live, client: Client) -> None:
    talk = [{"role": "system", "content": "be short"}, {"role": "user", "content": "a b c"}]
    rows = [{"prompt": "one"}, {"prompt": "one two", "topic": "x"}, {"prompt": talk, "topic": None}]
    install_tokenizer(live, "words")
    file = client.files.create(jsonl(*rows))
    found = client.files.validate(file, model="words")
    assert (found.file_id, found.is_valid, found.num_rows, found.errors) == (file.id, True, 3, [])
    assert {one.name: one.rows for one in found.columns} == {"prompt": 3, "topic": 1}
    assert (found.fits_rewards, found.fits_stored_completions) == (True, False)
    assert found.characters is not None
    assert (found.characters.least, found.characters.most) == (3, 14)
    assert [(one.least, one.most, one.count) for one in found.characters.bins] == [
        (2, 3, 1),
        (4, 7, 1),
        (8, 15, 1),
    ]
    assert found.tokens is not None
    assert (found.model, found.tokens_note) == ("words", None)
    assert (found.tokens.least, found.tokens.p50, found.tokens.most) == (1, 2, 5)
    assert (found.tokens.mean, found.tokens.counted) == (8 / 3, 3)


def test_of_a_large_file_some_prompts_are_tokenized(
    live: Live, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.file_validation.MOST_TOKENIZED", 10)
    install_tokenizer(live, "words")
    file = client.files.create(jsonl(*({"prompt": "a " * (1 + n)} for n in range(25))))
    found = client.files.validate(file, model="words")
    assert found.characters is not None
    assert found.tokens is not None
    assert (found.characters.counted, found.tokens.counted) == (25, 9)
    assert (found.tokens.least, found.tokens.most) == (1, 25)


@pytest.mark.parametrize(
    ("row", "uses"),
    [
        ({"prompt": "a", "completions": ["b", "c"], "rewards": [1, 0]}, (False, True)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, (False, True)),
        ({"prompt_ids": [1, 2], "completion_ids": [[3], [4]], "rewards": [0, 1]}, (False, True)),
    ],
)
def test_it_says_which_jobs_can_train_on_a_file(
    client: Client, row: dict[str, Any], uses: tuple[bool, bool]
) -> None:
    found = client.files.validate(client.files.create(jsonl(row, row)))
    assert (found.fits_rewards, found.fits_stored_completions) == uses
    assert (found.characters is None) is ("prompt_ids" in row)
    if "prompt_ids" in row:
        assert found.tokens is not None
        assert found.tokens.most == 2
    else:
        assert "no model was named" in str(found.tokens_note)


def test_it_says_why_no_tokens_were_counted(live: Live, client: Client) -> None:
    install_tokenizer(live, "broken")
    (live.settings.home / "models" / "broken" / "tokenizer.json").write_text("{}")
    file = client.files.create(jsonl({"prompt": "a"}))
    for model, why in (("base", "has no tokenizer.json"), ("x/y", "no folder"), ("broken", "read")):
        found = client.files.validate(file, model=model)
        assert (found.is_valid, found.tokens, found.model) == (True, None, None)
        assert why in str(found.tokens_note)


def test_a_file_of_an_earlier_version_with_rows_that_cannot_be_used_is_read_again(
    live: Live, client: Client, error_of: Callable[..., Any]
) -> None:
    file = client.files.create(jsonl({"prompt": "a"}, {"prompt": "b"}))
    path = live.settings.artifacts_path / live.runtime.artifacts.file(file.id)
    path.write_bytes(jsonl({"prompt": "a"}, {"text": "b"}, {"prompt": "c"}))
    found = client.files.validate(file)
    assert (found.is_valid, found.fits_rewards, found.num_rows) == (False, False, 2)
    assert [(one.row, one.param) for one in found.errors] == [(2, "prompt")]
    path.unlink()
    answer = live.http.post(f"/v1/files/{file.id}/validate")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "content_damaged")


def test_a_wrong_question_is_refused(live: Live, error_of: Callable[..., Any]) -> None:
    path = f"/v1/files/{live.upload().json()['id']}/validate"
    for query, param in (({"method": "sft"}, "method"), ({"modl": "base"}, "modl")):
        answer = live.http.post(path, params=query)
        assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert live.http.post("/v1/files/file-x/validate").status_code == 404
