"""Data sets by name: files, folders and the hub."""

import json
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from pyarrow import parquet

from dar.errors import InvalidRequestError, ServiceUnavailableError
from dar.training.data.rows import check_rows
from dar.training.data.sets import open_rows


def test_data_sets_come_from_files_and_folders(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "table.csv").write_text("prompt,answer\nq,1\n")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    assert list(open_rows(str(tmp_path), split="test")) == rows
    assert list(open_rows(str(tmp_path / "test.jsonl"))) == rows
    assert open_rows(str(tmp_path / "table.csv"))[0] == {"prompt": "q", "answer": "1"}
    assert list(open_rows(str(tmp_path / "saved"))) == rows
    with pytest.raises(InvalidRequestError, match="has no split 'test', but train"):
        open_rows(str(tmp_path / "saved"), split="test")
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    assert list(open_rows(str(tmp_path / "one"))) == rows
    with pytest.raises(InvalidRequestError, match="has no splits"):
        open_rows(str(tmp_path / "one"), split="validation")


def test_a_parquet_file_is_read_alone_whatever_it_is_called(tmp_path: Path) -> None:
    names = ["a?b", "axb", "a[x]b", "a#b%41"]
    for name in names:
        Dataset.from_list([{"prompt": name}]).to_parquet(tmp_path / f"{name}.parquet")
    for name in names:
        assert list(open_rows(str(tmp_path / f"{name}.parquet"))) == [{"prompt": name}]


def test_the_fields_of_a_csv_file_are_texts_as_written_and_rewards_beside_completions_numbers(
    tmp_path: Path,
) -> None:
    """A reader that guesses types reads 12345678901234567 as 1.2e16 if a row has no value."""
    exact = ("12345678901234567", "007", "NA", "null", "None", "1.50", "true", " x ", "", "é")
    table = tmp_path / "table.csv"
    for encoding, ending in (("utf-8", "\n"), ("utf-8-sig", "\r\n")):
        text = ending.join(("prompt,a,reward", *(f"q,{value},1" for value in exact), ""))
        table.write_bytes(text.encode(encoding))
        assert list(open_rows(str(table))) == [
            {"prompt": "q", "a": value, "reward": "1"} for value in exact
        ]
    table.write_text('prompt,completion,reward,behavior_logps\n"a, ""b""",2,0.5,-3\nc,,,\n')
    assert list(open_rows(str(table))) == [
        {"prompt": 'a, "b"', "completion": "2", "reward": 0.5, "behavior_logps": -3.0},
        {"prompt": "c", "completion": "", "reward": None, "behavior_logps": None},
    ]
    table.write_text("prompt,completion,reward\na,b,1\na,b,NaN\n")
    with pytest.raises(InvalidRequestError, match="row 2: reward must be a number or null, not 'N"):
        check_rows(open_rows(str(table)), is_replay=True)
    table.write_bytes(b"prompt\nx\n\xff\n")
    with pytest.raises(InvalidRequestError, match=r"table\.csv is not UTF-8"):
        open_rows(str(table))
    table.write_text(f"prompt\n{'long ' * 40_000}\n")
    assert len(open_rows(str(table))[0]["prompt"]) == 200_000


@pytest.mark.parametrize("groups", [0, 1])
def test_a_parquet_file_without_rows_is_told_as_one(tmp_path: Path, groups: int) -> None:
    schema = pyarrow.schema([("prompt", pyarrow.string())])
    path = tmp_path / "none.parquet"
    with parquet.ParquetWriter(path, schema) as writer:
        for _ in range(groups):
            writer.write_table(schema.empty_table())
    with pytest.raises(InvalidRequestError) as caught:
        open_rows(str(path))
    assert caught.value.message == f"{path} has no rows"


def test_a_hub_that_cannot_be_reached_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what the variable of this name says
    with pytest.raises(ServiceUnavailableError, match="hub cannot be reached to load the data set"):
        open_rows("somebody/prompts")
