"""Ids and names are matched from end to end: a last line break does not pass."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from dar.settings import Settings
from fakes.live_service import Live
from service.app import create_app
from service.openapi import describe


def patterns_in(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(found := value.get("pattern"), str):
            yield found
        for inner in value.values():
            yield from patterns_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from patterns_in(inner)


def test_no_pattern_of_the_api_accepts_a_last_line_break() -> None:
    document = describe(create_app(Settings()))
    patterns = {*patterns_in(document), *patterns_in(Settings.model_json_schema())}
    assert len(patterns) >= 8
    for pattern in sorted(patterns):
        check_last_line_break(pattern)


def is_accepted(adapter: TypeAdapter[str], text: str) -> bool:
    try:
        adapter.validate_python(text)
    except ValidationError:
        return False
    return True


def check_last_line_break(pattern: str) -> None:
    adapter = TypeAdapter(Annotated[str, Field(pattern=pattern)])

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(st.from_regex(pattern, fullmatch=True))
    def check(text: str) -> None:
        text = text.rstrip("\n")
        assert is_accepted(adapter, text), pattern
        if "[^" not in pattern:  # a pattern that names what it excludes may allow line breaks
            assert not is_accepted(adapter, text + "\n"), pattern

    check()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "a/b\n"}, "model"),
        ({"model": "base\n"}, "model"),
        ({"training_file": "hf://a/b\n"}, "training_file"),
        ({"training_file": "hf://a/b?split=x%0A"}, "training_file"),
        ({"suffix": "mine\n"}, "suffix"),
    ],
)
def test_a_job_with_a_line_break_at_the_end_of_a_name_is_refused(
    serve: Callable[..., Live],
    error_of: Callable[[httpx2.Response], dict[str, Any]],
    change: dict[str, str],
    param: str,
) -> None:
    live = serve(hub_models=("*",), hub_datasets=("*",))
    spec = live.spec() | change
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))
    assert error["param"] == param


@pytest.mark.parametrize(
    "headers", [{"X-Key\n": "v"}, {"X-Key": "v\n"}, {"Authorization": "Bearer x\n"}]
)
def test_a_secret_header_with_a_line_break_at_its_end_is_refused(
    live: Live, headers: dict[str, str]
) -> None:
    body = {"name": "judge", "url": "http://127.0.0.1:61999/score", "headers": headers}
    assert live.http.post("/v1/reward_endpoints", json=body).status_code == 400
