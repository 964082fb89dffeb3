"""Uploads: every row is read, one bad row and nothing is stored."""

import encodings.aliases
import hashlib
import json
import socket
import time
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import update

from dar.settings import Settings
from fakes.live_service import Live
from service.store.tables import FileRow

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
    head = live.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(GOOD))
    assert head.headers["repr-digest"] == part.headers["repr-digest"]
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
        (b"[1]", "must be an object with its columns, but it is a list"),
        (b'{"text": "x"}', "no 'prompt'; its columns: text"),
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"prompt": 3}', "it is a number"),
        (b'{"prompt": []}', "it is an empty list"),
        (b'{"prompt": "a", "completion": "b", "reward": 1}', "row 1 has no completions"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "row 1 has no completions"),
        (b'{"prompt": [{"role": "user", "content": ""}]}', "not empty"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' occurs twice"),
        (b'{"prompt": "a", "x": NaN}', "the column 'x' holds nan"),
        (b'{"prompt": "a", "x": 1e999}', "too large"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "%s"}' % (b"x" * 4 * 1024**2), "longer than 4,194,304 bytes"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"", "the row is blank"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"}", "nested over 64 levels deep"),
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
    stored = [p for p in (live.settings.artifacts_path / "files").rglob("*") if p.is_file()]
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


def test_no_charset_of_an_upload_is_a_fault_of_the_service(
    live: Live, error_of: Callable[..., Any]
) -> None:
    """Python knows charsets that are none of the web; some refuse every text."""
    names = {*encodings.aliases.aliases.values(), "undefined", "idna", "punycode", "none", "é"}
    found = {}
    for charset in sorted(names):
        kind = f"multipart/form-data; boundary=x; charset={charset}".encode("latin-1")
        for name in (b"purpose", b"x\xff"):
            part = b'content-disposition: form-data; name="' + name + b'"\r\n\r\nfine-tune'
            body = b"--x\r\n" + part + b"\r\n--x--\r\n"
            answer = live.http.post("/v1/files", content=body, headers={b"content-type": kind})
            assert answer.status_code == 400, charset
            found[charset, name] = error_of(answer)
    refused = {charset for (charset, _), error in found.items() if error["code"] == "invalid_form"}
    assert "undefined" in refused
    assert "leave the charset out" in found["undefined", b"purpose"]["message"]
    assert found["utf_8", b"purpose"]["code"] == "missing"


def test_a_file_that_a_job_needs_stays(live: Live, error_of: Callable[..., Any]) -> None:
    job = live.submit()
    path = f"/v1/files/{job['training_file']}"
    answer = live.http.delete(path)
    assert (answer.status_code, error_of(answer)["code"]) == (409, "file_in_use")
    live.http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    deleted = live.http.delete(path)
    assert deleted.json() == {"id": job["training_file"], "object": "file", "deleted": True}
    assert live.http.get(path).status_code == 404
    assert not any(p.is_file() for p in (live.settings.artifacts_path / "files").rglob("*"))


def test_columns_that_do_not_fit_the_method_are_told_with_their_row(
    live: Live, error_of: Callable[..., Any]
) -> None:
    rows = [{"prompt": "a", "topic": "x"}, {"prompt": "b"}, {"prompt": "c"}]
    file_id = live.upload("\n".join(map(json.dumps, rows)).encode()).json()["id"]
    component = {"name": "a", "url": "http://127.0.0.1:61999/", "columns": ["topic", "none"]}
    spec = live.spec(training_file=file_id, dar={"rewards": {"components": [component]}})
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))
    told = [(problem["param"], problem["row"]) for problem in error["errors"]]
    path = "method.dar.rewards.components[0].columns"
    assert told == [(f"{path}[0]", 2), (f"{path}[1]", 1)]


def test_an_upload_for_which_there_is_no_room_is_a_503(
    live: Live, error_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = Settings().min_free_bytes
    free = SimpleNamespace(free=len(GOOD) + reserved - 1, total=2 * reserved)
    monkeypatch.setattr("service.storage.folder.shutil.disk_usage", lambda _: free)
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
MIXED_FILES: list[list[dict[str, Any]]] = [
    [SCORED, {"prompt": "a", "completion": "b"}],
    [SCORED, {"prompt": "a"}],
    [{"prompt": "a"}, SCORED],
    [PAIR, {**PAIR, "behavior_logps": [-1, -2]}],
    [SCORED, PAIR],
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
    length = {"hyperparameters": {"max_steps": 2}}
    assert (
        offline(live, rows, preset="paper", **length).status_code == 200
    )  # which has a temperature of its own
    for part in ({"hyperparameters": {"dar_k": 7}}, {"sampling": {"temperature": 0.5}}):
        error = error_of(offline(live, rows, **part))
        section, values = next(iter(part.items()))
        assert error["param"] == f"method.dar.{section}.{next(iter(values))}"
        assert "leave it out" in error["message"]


def test_a_job_without_rewards_takes_no_file_of_prompts(
    live: Live, error_of: Callable[..., Any]
) -> None:
    first = error_of(offline(live, [{"prompt": "a"}, {"prompt": "b"}]))["errors"][0]
    assert (first["param"], first["row"], first["code"]) == ("training_file", 1, "missing_column")
    assert "no completions" in first["message"]


@pytest.mark.parametrize("rows", MIXED_FILES)
def test_a_file_of_two_formats_is_refused_with_the_row_that_differs(
    live: Live, error_of: Callable[..., Any], rows: list[dict[str, Any]]
) -> None:
    content = "\n".join(map(json.dumps, [rows[0], rows[0], rows[1], rows[0]])).encode()
    [problem] = error_of(live.upload(content))["errors"]
    assert problem["row"] == 3
    assert problem["code"] in ("mixed_format", "missing")


def test_a_stored_file_of_two_formats_is_refused_by_a_job_without_rewards(
    live: Live, error_of: Callable[..., Any]
) -> None:
    """Earlier versions took such files."""
    file_id = live.upload(json.dumps(SCORED).encode()).json()["id"]
    columns = {name: {"first": 1, "missing": 2, "absent": 2} for name in SCORED}
    with live.runtime.database.write() as transaction:
        transaction.execute(update(FileRow).where(FileRow.id == file_id).values(columns=columns))
    spec = live.spec(training_file=file_id, dar={"rewards": None})
    first = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))["errors"][0]
    assert (first["param"], first["row"], first["code"]) == ("training_file", 2, "mixed_format")


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


# --- what an upload costs -------------------------------------------------------------------------


def test_an_upload_costs_time_in_proportion_to_its_size(
    live: Live, error_of: Callable[..., Any]
) -> None:
    """A search for a repeated key took 3 s for each of these rows of 0.2 MB."""
    keys = b",".join(b'"k%d":1' % number for number in range(18_000))
    row = b'{"prompt": "a", "x": {%s, "k17999": 2}}\n' % keys
    began = time.process_time()
    error = error_of(live.upload(row * 5))
    assert time.process_time() - began < 3
    assert [problem["code"] for problem in error["errors"]] == ["duplicate_key"] * 5


def test_an_upload_of_few_columns_in_each_of_many_rows_costs_no_more(live: Live) -> None:
    """Each row was compared with all columns of the file."""
    wide = [json.dumps({"prompt": "a", f"c{number}": 1}) for number in range(250)]
    began = time.process_time()
    answer = live.upload("\n".join([*wide, *['{"prompt":"a"}'] * 40_000]).encode())
    assert answer.json()["columns"] == ["prompt"]
    assert time.process_time() - began < 2


def test_the_memory_of_an_upload_does_not_grow_with_its_columns(
    live: Live, error_of: Callable[..., Any]
) -> None:
    """Names of columns were collected before they were counted."""
    rows = (
        b'{"prompt": "a",%s}\n' % b",".join(b'"r%dc%d":1' % (row, at) for at in range(10_000))
        for row in range(20)
    )
    content = b"".join(rows)
    tracemalloc.start()
    try:
        error = error_of(live.upload(content))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {problem["code"] for problem in error["errors"]} == {"too_many_columns"}
    assert peak < 3 * len(content) + 16 * 1024**2


def test_the_rest_of_a_row_that_is_too_long_is_no_further_row(
    live: Live, error_of: Callable[..., Any]
) -> None:
    content = b'{"prompt": "%s"}\n{"prompt": 3}\n' % (b"x" * 9 * 1024**2)
    error = error_of(live.upload(content))
    assert [(problem["row"], problem["code"]) for problem in error["errors"]] == [
        (1, "row_too_long"),
        (2, "invalid_row"),
    ]


def test_a_check_ends_when_its_client_leaves(live: Live) -> None:
    rows = b'{"prompt": "hi", "a": 1}\n' * 1_000_000  # about 10 s of checks
    head = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    body = head + rows + b"\r\n--x--\r\n"
    lines = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live.key('api_key')}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    kept = live.settings.artifacts_path / "files"
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as connection:
        connection.sendall(lines.encode() + body)
        wait_for(lambda: any((kept / "tmp").iterdir()))
    began = time.monotonic()
    wait_for(lambda: not any((kept / "tmp").iterdir()))
    assert time.monotonic() - began < 3
    assert live.http.get("/v1/files").json()["data"] == []
    assert [path.name for path in kept.iterdir()] == ["tmp"]


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
