"""A half-sent spool of an earlier version gives exactly the rows that are unsent."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.worker import EventRow
from worker.spool import SpoolReader, SpoolWriter


@pytest.fixture
def spool(stored: Path, tmp_path: Path) -> Path:
    shutil.copytree(stored / "spool" / "rows", tmp_path / "rows")
    return tmp_path / "rows"


@pytest.fixture
def expected(stored: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stored / "spool" / "expected.json").read_text())
    return found


def test_the_unsent_rows_are_read(spool: Path, expected: dict[str, Any]) -> None:
    reader = SpoolReader(spool)
    assert reader.acked == expected["acked"]
    read = reader.read()
    assert [json.loads(row.payload) for row in read] == expected["unsent"]
    assert len({row.segment for row in read}) == 2
    reader.ack(expected["last_seq"])
    assert SpoolReader(spool).read() == []


def test_a_writer_goes_on_behind_the_last_whole_row(spool: Path, expected: dict[str, Any]) -> None:
    writer = SpoolWriter(spool)
    assert writer.last_seq == expected["last_seq"]
    seq = writer.append(
        lambda seq, at: EventRow(type="event", seq=seq, at=at, level="info", message="next")
    )
    writer.close()
    read = [json.loads(row.payload) for row in SpoolReader(spool).read()]
    assert read[:-1] == expected["unsent"]
    assert (read[-1]["seq"], read[-1]["message"]) == (seq, "next")
    assert seq == expected["last_seq"] + 1
