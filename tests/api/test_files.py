"""Uploads: every row is read, one bad row and nothing is stored."""

import hashlib
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fakes.live_service import Live

GOOD = b'{"prompt": "hi", "topic": "a"}\n{"prompt": [{"role": "user", "content": "ho"}], "topic": null}\n'

LONG = f"bytes={'9' * 5000}-"


def test_an_upload_comes_back_as_it_was_with_what_was_found_in_it(live: Live) -> None:
    file = live.upload(GOOD).json()
    assert (file["object"], file["status"], file["purpose"]) == ("file", "processed", "fine-tune")
    assert (file["num_rows"], file["columns"], file["bytes"]) == (2, ["prompt"], len(GOOD))
    assert file["sha256"] == hashlib.sha256(GOOD).hexdigest()
    assert live.http.get(f"/v1/files/{file['id']}").json() == file
    content = live.http.get(f"/v1/files/{file['id']}/content")
    assert content.content == GOOD
    assert content.headers["etag"] == f'"{file["sha256"]}"'


def test_a_part_of_a_file_can_be_fetched(live: Live, error_of: Callable[..., Any]) -> None:
    path = f"/v1/files/{live.upload(GOOD).json()['id']}/content"
    part = live.http.get(path, headers={"range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, GOOD[5:10])
    tail = live.http.get(path, headers={"range": "bytes=-4"})
    assert (tail.status_code, tail.content) == (206, GOOD[-4:])
    stale = live.http.get(path, headers={"range": "bytes=5-9", "if-range": '"old"'})
    assert (stale.status_code, stale.content) == (200, GOOD)
    known = live.http.get(path, headers={"if-none-match": part.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")
    for wrong in ("bytes=900-", "bytes=0-1,3-4", "bytes=9-5", "bytes=-0", "bytes=-", LONG):
        answer = live.http.get(path, headers={"range": wrong})
        assert (answer.status_code, error_of(answer)["code"]) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{len(GOOD)}"
    for unknown in ("rows=1-2", "x"):
        ignored = live.http.get(path, headers={"range": unknown})
        assert (ignored.status_code, ignored.content) == (200, GOOD)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object, but it is a list"),
        (b'{"text": "x"}', "no 'prompt'; its columns: text"),
        (b'{"prompt": "a", "completions": ["b"], "rewards": [1, 2]}', "needs 1 rewards"),
        (b'{"prompt": "a", "completions": "b", "chosen": "c"}', "keep the columns of one format"),
        (b'{"prompt": "a", "chosen": "b"}', "'chosen' but no 'rejected'"),
        (b'{"chosen": "yes", "rejected": "no"}', "no common beginning"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen and rejected are the same"),
        (b'{"prompt": "a", "chosen": "b", "rejected": ""}', "rejected is empty after the prompt"),
        (
            b'{"prompt": "a", "chosen": [{"role": "assistant", "content": ""}], "rejected": "c"}',
            "one of chosen and rejected is a text",
        ),
        (b'{"prompt_ids": [-1], "completion_ids": [[2]], "rewards": [1]}', "token ids from 0"),
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"prompt": 3}', "it is a number"),
        (b'{"prompt": []}', "it is an empty list"),
        (b'{"prompt": [{"role": "user"}]}', "exactly 'role' and 'content'"),
        (b'{"prompt": [{"role": "king", "content": "x"}]}', "the role must be one of"),
        (b'{"prompt": [{"role": "user", "content": ""}]}', "not empty"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' occurs twice"),
        (b'{"prompt": "a", "x": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "x": 1e999}', "too large"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"", "the row is blank"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_one_bad_row_among_thousands_is_named(
    live: Live, error_of: Callable[..., Any], row: bytes, says: str
) -> None:
    rows = [b'{"prompt": "fine"}'] * 3000
    rows[1233] = row
    answer = live.upload(b"\n".join(rows))
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "invalid_training_file")
    assert [problem["row"] for problem in error["errors"]] == [1234]
    assert says in error["message"]
    assert error["message"].startswith("row 1234: ")
    assert live.http.get("/v1/files").json()["data"] == []
    stored = [p for p in live.settings.artifacts_path.rglob("*") if p.is_file()]
    assert stored == []


def test_the_first_fifty_bad_rows_are_told(live: Live, error_of: Callable[..., Any]) -> None:
    error = error_of(live.upload(b"{}\n" * 80))
    assert [problem["row"] for problem in error["errors"]] == list(range(1, 51))


def test_blank_lines_are_forgiven_at_the_end_only(live: Live, error_of: Callable[..., Any]) -> None:
    assert live.upload(GOOD + b"\n \n\n").json()["num_rows"] == 2
    assert error_of(live.upload(b"\n" + GOOD))["errors"][0]["row"] == 1
    assert error_of(live.upload(b"\n\n"))["errors"][0]["code"] == "empty_file"


def test_an_upload_over_the_limit_is_refused(
    serve: Callable[..., Any], error_of: Callable[..., Any]
) -> None:
    live = serve(max_file_bytes=1000)
    answer = live.upload(b'{"prompt": "%s"}\n' % (b"x" * 200_000))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")


def test_a_form_that_is_not_as_it_should_be_is_a_400(
    live: Live, error_of: Callable[..., Any]
) -> None:
    file = {"file": ("a.jsonl", GOOD)}
    tries: list[dict[str, Any]] = [
        {"files": file, "data": {"purpose": "batch"}},
        {"files": file, "data": {"purpose": "fine-tune", "expires_after[seconds]": "3600"}},
        {"files": {"purpose": (None, "fine-tune")}},
    ]
    params = [error_of(live.http.post("/v1/files", **one))["param"] for one in tries]
    assert params == ["purpose", "expires_after[seconds]", "file"]
    answer = live.http.post("/v1/files", json={"purpose": "fine-tune"})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")
    broken = {"content-type": "multipart/form-data"}
    answer = live.http.post("/v1/files", content=b"--x\r\nnonsense", headers=broken)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_form")


def test_a_file_that_a_job_needs_stays(live: Live, error_of: Callable[..., Any]) -> None:
    job = live.submit()
    path = f"/v1/files/{job['training_file']}"
    answer = live.http.delete(path)
    assert (answer.status_code, error_of(answer)["code"]) == (409, "file_in_use")
    live.http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    deleted = live.http.delete(path)
    assert deleted.json() == {"id": job["training_file"], "object": "file", "deleted": True}
    assert live.http.get(path).status_code == 404
    assert not any(p.is_file() for p in live.settings.artifacts_path.rglob("*"))


def test_columns_that_do_not_fit_the_method_are_told_with_their_row(
    live: Live, error_of: Callable[..., Any]
) -> None:
    rows = [{"prompt": "a", "topic": "x"}, {"prompt": "b", "completion": "c"}, {"prompt": "c"}]
    file_id = live.upload("\n".join(map(json.dumps, rows)).encode()).json()["id"]
    component = {"name": "a", "url": "http://127.0.0.1:61999/", "columns": ["topic", "none"]}
    spec = live.spec(training_file=file_id, dar={"rewards": {"components": [component]}})
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))
    told = [(problem["param"], problem["row"]) for problem in error["errors"]]
    path = "method.dar.rewards.components[0].columns"
    assert told == [("training_file", 2), (f"{path}[0]", 2), (f"{path}[1]", 1)]


def test_an_upload_for_which_there_is_no_room_is_a_503(
    live: Live, error_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=2 * len(GOOD) - 1)
    monkeypatch.setattr("service.artifacts.shutil.disk_usage", lambda _: free)
    answer = live.upload(GOOD)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "storage_full")


def offline(live: Live, rows: list[dict[str, Any]], **values: Any) -> Any:
    """Answer to a job without rewards over a file of these rows."""
    file = live.upload("\n".join(map(json.dumps, rows)).encode())
    assert file.status_code == 200, file.text
    spec = live.spec(training_file=file.json()["id"], dar={"rewards": None} | values)
    return live.http.post("/v1/fine_tuning/jobs", json=spec)


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


OFFLINE_FILES: list[list[dict[str, Any]]] = [
    [{"prompt": "a", "chosen": "b", "rejected": "c"}],
    [{"chosen": TALK, "rejected": [*TALK[:1], {"role": "assistant", "content": "hu"}]}],
    [
        {"prompt": "a", "completions": ["b", "c"], "rewards": [1, None]},
        {"prompt": "a", "completions": ["b"], "rewards": None},
    ],
    [{"prompt": TALK[:1], "completion": "b", "reward": 0.5, "behavior_logps": -2.5}],
    [{"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5]], "rewards": [0, 1]}],
]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SCORED = {"prompt": "a", "completion": "b", "reward": 1}
NO_OFFLINE_FILES: list[tuple[list[dict[str, Any]], int, str, str]] = [
    ([{"prompt": "a"}, {"prompt": "b"}], 1, "missing_column", "no completions"),
    ([{"prompt": "a", "completion": "b"}], 1, "missing_column", "no rewards"),
    ([SCORED, {"prompt": "a", "completion": "b"}], 2, "mixed_format", "no 'reward'"),
    ([SCORED, {"prompt": "a"}], 2, "mixed_format", "no 'completion'"),
    ([PAIR, {**PAIR, "behavior_logps": [-1, -2]}], 1, "mixed_format", "no 'behavior_logps'"),
    ([SCORED, PAIR], 2, "mixed_format", "no 'completion'"),
]


def test_a_job_without_rewards_takes_files_with_completions(live: Live) -> None:
    for rows in OFFLINE_FILES:
        answer = offline(live, rows * 3, hyperparameters={"n_epochs": 2, "batch_size": 2})
        assert answer.status_code == 200, answer.text
        job = answer.json()
        assert job["method"]["dar"]["rewards"] is None
        assert job["progress"]["total_steps"] == len(rows) * 3
    assert live.claim().body["spec"]["method"]["dar"]["rewards"] is None


@pytest.mark.parametrize("rewards", [[None, None], None])
def test_a_file_whose_rewards_are_all_null_is_refused(
    live: Live, error_of: Callable[..., Any], rewards: list[None] | None
) -> None:
    row = {"prompt": "a", "completions": ["b", "c"], "rewards": rewards}
    lines = b"".join(json.dumps(row).encode() + b"\n" for _ in range(2))
    error = error_of(live.upload(lines))
    assert (error["code"], error["param"]) == ("invalid_training_file", "file")
    assert "every reward is null" in error["message"]
    assert "service" not in error["message"]
    scored = json.dumps(row | {"rewards": [1, None]}).encode()
    assert live.upload(lines + scored).status_code == 200


def test_a_job_without_rewards_takes_no_options_of_sampling(
    live: Live, error_of: Callable[..., Any]
) -> None:
    rows = OFFLINE_FILES[0]
    assert (
        offline(live, rows, preset="paper").status_code == 200
    )  # which has a temperature of its own
    for part in ({"hyperparameters": {"dar_k": 7}}, {"sampling": {"temperature": 0.5}}):
        error = error_of(offline(live, rows, **part))
        section, values = next(iter(part.items()))
        assert error["param"] == f"method.dar.{section}.{next(iter(values))}"
        assert "leave it out" in error["message"]


def test_files_that_a_job_without_rewards_cannot_train_on_are_refused(
    live: Live, error_of: Callable[..., Any]
) -> None:
    for rows, row, code, says in NO_OFFLINE_FILES:
        first = error_of(offline(live, rows))["errors"][0]
        assert (first["param"], first["row"], first["code"]) == ("training_file", row, code)
        assert says in first["message"]


def test_files_with_completions_are_refused_where_completions_are_sampled(
    live: Live, error_of: Callable[..., Any]
) -> None:
    rows = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    file_id = live.upload(rows).json()["id"]
    spec = live.spec(training_file=file_id)
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))
    told = [(problem["param"], problem["row"], problem["code"]) for problem in error["errors"]]
    assert told == [("training_file", 1, "unexpected_column")] * 2
    dar = {"evaluation": {"every_steps": 1}}
    error = error_of(
        live.http.post("/v1/fine_tuning/jobs", json=live.spec(validation_file=file_id, dar=dar))
    )
    assert {problem["param"] for problem in error["errors"]} == {"validation_file"}
    without = {**dar, "rewards": None}
    taken = live.spec(training_file=file_id, validation_file=file_id, dar=without)
    assert live.http.post("/v1/fine_tuning/jobs", json=taken).status_code == 200
    prompts = live.upload().json()["id"]
    refused = live.spec(training_file=file_id, validation_file=prompts, dar=without)
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=refused))
    assert [problem["param"] for problem in error["errors"]] == ["validation_file"]
