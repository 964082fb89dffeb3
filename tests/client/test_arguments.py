"""Arguments of the SDK that are nearly right: taken where their meaning is plain, else named."""

import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.client import Client
from dar.errors import ConfigurationError
from dar.protocol.jobs import Job
from dar.protocol.spec import Method


def test_an_object_of_the_service_stands_for_its_id(
    client: Client, new_job: Callable[..., Job], trained: Any, method: dict[str, Any]
) -> None:
    job = new_job()
    file = client.files.retrieve(job.training_file)
    assert client.files.retrieve(file) == file
    model = client.models.retrieve("tiny")
    assert client.models.retrieve(model) == model
    again = client.jobs.create(
        model=model, training_file=file, method=Method.model_validate(method)
    )
    assert (again.training_file, again.method) == (file.id, job.method)
    for one in (job, again):
        assert client.jobs.cancel(one).id == one.id
        assert client.jobs.wait(one, timeout_seconds=5).status == "cancelled"
    assert list(client.jobs.events(job))
    found = client.checkpoints.retrieve(client.jobs.retrieve(trained.job_id), trained.checkpoint)
    assert found == trained.checkpoint


def test_one_name_is_a_list_of_one(client: Client, trained: Any) -> None:
    assert list(client.jobs.metrics(trained.job_id, names="dar/loss").series) == ["dar/loss"]


def test_files_of_every_kind_arrive_whole(client: Client, prompts: bytes, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    odd.write_bytes(prompts)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(prompts))
    sent = {"caf\ufffd.jsonl": odd, "upload.jsonl": bytearray(prompts)}
    for name, file in sent.items():
        assert client.files.create(file).filename == name  # type: ignore[arg-type]  # a bytearray is no bytes
    with odd.open("rb") as plain, gzip.open(packed) as unpacked:
        made = [client.files.create(plain), client.files.create(unpacked)]  # type: ignore[arg-type]  # a GzipFile is no BinaryIO
    made.append(client.files.create(prompts, filename="caf\udce9.jsonl"))
    assert [file.bytes for file in made] == 3 * [len(prompts)]
    assert [made[0].filename, made[2].filename] == 2 * ["caf\ufffd.jsonl"]


UNUSABLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no id": (lambda c: c.jobs.retrieve(None), "an id is None"),
    "an empty id": (lambda c: c.jobs.cancel(""), "an id is ''"),
    "a path": (lambda c: c.files.content(".."), "an id is '..'"),
    "half a character": (lambda c: c.models.retrieve("\ud83d"), "an id is"),
    "a number": (lambda c: c.checkpoints.list(3), "an id is 3"),
    "names": (lambda c: c.jobs.metrics("ftjob-1", names=[1]), r"names is \[1\]"),
    "a label": (lambda c: c.jobs.list(metadata="team"), "metadata is of the type str"),
    "half a label": (lambda c: c.jobs.list(metadata={"t": "\ud83d"}).page(), "cannot be written"),
    "a spec": (lambda c: c.jobs.create([1]), "spec is of the type list"),
    "a set": (lambda c: c.jobs.create(model={"a"}), "holds a value of the type set"),
    "headers": (lambda c: c.reward_endpoints.create("a", "b", headers="s3cret"), "headers is of"),
    "a sample": (lambda c: c.reward_endpoints.probe("rwe_1", samples={"a": 1}), "samples is of"),
    "texts": (lambda c: c.reward_endpoints.probe("rwe_1", samples=["s"]), r"samples\[0\] is of"),
    "a component": (lambda c: c.reward_endpoints.probe(component="c"), "component is of the type"),
    "a text file": (lambda c: c.files.create(io.StringIO("{}")), "opened for reading text"),
    "rows": (lambda c: c.files.create([{"prompt": "a"}]), "file is of the type list"),
    "a generator": (lambda c: c.files.create(iter([b"{}"])), "file is of the type list_iterator"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_sent_is_named_before_a_request(name: str) -> None:
    call, said = UNUSABLE[name]
    with (
        Client("key", "http://127.0.0.1:9", max_retries=0) as client,
        pytest.raises(ConfigurationError, match=said) as caught,
    ):
        call(client)
    assert "s3cret" not in caught.value.message
