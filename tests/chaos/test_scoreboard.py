"""The page of results shows which code each row has run on."""

import json
from pathlib import Path

import pytest

from chaos import scoreboard
from chaos.scoreboard import Result, Row, results_of


def row(name: str) -> Row:
    found = Result(holds=True, figures={"kills": 3})
    return Row(name, "three kills", "nothing is lost", lambda: found)


def test_a_result_of_other_code_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoreboard, "RESULTS", tmp_path)
    rows = [row("fresh"), row("older"), row("oldest"), row("never")]
    for one in rows[:3]:
        scoreboard.run(one)
    for name, gone in (("older", ()), ("oldest", ("commit",))):
        path = tmp_path / f"{name}.json"
        said = json.loads(path.read_text()) | {"version": "0123456789ab", "commit": "f00d"}
        path.write_text(json.dumps({key: said[key] for key in said if key not in gone}))
    shown = {line.split("`")[1]: line for line in results_of(rows).splitlines() if "| `" in line}
    assert f"version `{scoreboard.version()}`" in results_of(rows)
    assert "other code" not in shown["fresh"]
    assert "**run on other code**: version `0123456789ab`, commit `f00d` | yes |" in shown["older"]
    assert "commit `unknown`" in shown["oldest"]
    assert "not run" in shown["never"]
