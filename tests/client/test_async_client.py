"""The asynchronous client: the same resources, methods and arguments, through a live service."""

import asyncio
import contextlib
import inspect
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dar
from dar.client import AsyncClient, AsyncListing, Client, Listing
from dar.client.asynchronous import THREADS
from dar.client.transport import Transport
from dar.errors import ConflictError, InvalidRequestError, NotFoundError
from dar.protocol.jobs import Job

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SECTION = PAGE.partition("\n## Errors, retries and limits")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


def methods(thing: object) -> dict[str, inspect.Signature]:
    """The public methods of an object, with their arguments."""
    found = {
        name: getattr(type(thing), name) for name in dir(type(thing)) if not name.startswith("_")
    }
    return {name: inspect.signature(one) for name, one in found.items() if callable(one)}


def resources(client: object) -> dict[str, Any]:
    return {name: one for name, one in vars(client).items() if not name.startswith("_")}


def test_both_clients_have_the_same_resources_methods_and_arguments() -> None:
    with Client("dar-sk-x", "http://127.0.0.1:1") as client:
        twin = AsyncClient("dar-sk-x", "http://127.0.0.1:1")
        plain, other = resources(client), resources(twin)
        assert list(plain) == list(other)
        for name, resource in plain.items():
            theirs = methods(other[name])
            assert {n: str(s) for n, s in methods(resource).items()} == {
                n: str(s) for n, s in theirs.items()
            }, name
            for method, signature in methods(resource).items():
                kind = str(signature.return_annotation)
                comes = any(word in kind for word in ("Listing[", "Following[", "Iterator["))
                is_awaited = inspect.iscoroutinefunction(getattr(type(other[name]), method))
                assert is_awaited is not comes, f"{name}.{method}"
        assert set(methods(client)) == set(methods(twin))
        assert inspect.signature(Client) == inspect.signature(AsyncClient)
        asyncio.run(twin.close())
    assert dar.AsyncClient is AsyncClient


def test_the_asynchronous_client_drives_a_job(
    client: Client, service: Any, prompts: bytes, method: dict[str, Any]
) -> None:
    seen: list[str] = []

    async def drive() -> Job:
        async with AsyncClient(service.api_key, service.url) as twin:
            file = await twin.files.create(prompts)
            job = await twin.jobs.create(model="tiny", training_file=file.id, method=method)
            assert isinstance(twin.jobs.list(), AsyncListing)
            assert isinstance(client.jobs.list(), Listing)
            listed = [found.id async for found in twin.jobs.list(limit=1)]
            assert listed == [found.id for found in client.jobs.list()]
            with pytest.raises(NotFoundError) as absent:
                await twin.files.retrieve("file-none")
            assert absent.value.request_id
            with pytest.raises(InvalidRequestError):
                await twin.jobs.create(model="tiny", training_file=file.id, method={"type": "dar"})
            waits = [
                asyncio.create_task(twin.jobs.wait(job.id, on_pause="wait", poll_seconds=0.05))
                for _ in range(50)
            ]
            async for changed in twin.jobs.watch(job.id, poll_seconds=0.02):
                if not seen:
                    await twin.jobs.cancel(job.id)
                seen.append(changed.status)
            assert [new async for new in twin.jobs.stream_metrics(job.id)] == []
            assert {(await wait).status for wait in waits} == {"cancelled"}
            with pytest.raises(ConflictError):
                await twin.jobs.pause(job.id)
            return await twin.jobs.retrieve(job.id)

    assert asyncio.run(drive()).status == "cancelled"
    assert seen == ["queued", "cancelled"]


def test_a_given_up_wait_leaves_no_thread_behind(
    client: Client, service: Any, new_job: Callable[..., Job]
) -> None:
    job = new_job()

    async def give_up() -> None:
        async with AsyncClient(service.api_key, service.url) as twin:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await twin.jobs.wait(job.id, poll_seconds=60)

    asyncio.run(give_up())
    for thread in threading.enumerate():
        if thread.name.startswith("dar-async-client"):
            thread.join(5)
            assert not thread.is_alive()
    client.jobs.cancel(job.id)


def test_open_streams_leave_room_for_requests(
    client: Client, service: Any, new_job: Callable[..., Job]
) -> None:
    job = new_job()

    async def follow(twin: AsyncClient, has_frame: asyncio.Semaphore) -> None:
        async for _ in twin.jobs.stream(job.id):
            has_frame.release()

    async def drive() -> str:
        async with AsyncClient(service.api_key, service.url) as twin:
            has_frame = asyncio.Semaphore(0)
            readers = [asyncio.create_task(follow(twin, has_frame)) for _ in range(THREADS + 1)]
            try:
                async with asyncio.timeout(20):
                    for _ in readers:
                        await has_frame.acquire()
                    found = await twin.jobs.retrieve(job.id)
            finally:
                client.jobs.cancel(job.id)
            await asyncio.gather(*readers)
            return found.status

    assert asyncio.run(drive()) == "queued"


def test_a_stream_that_its_reader_leaves_has_no_connection(
    client: Client, service: Any, new_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, ended = new_job(), threading.Event()
    opened = Transport.open

    @contextlib.contextmanager
    def watched(*args: Any, **options: Any) -> Iterator[Any]:
        try:
            with opened(*args, **options) as response:
                yield response
        finally:
            ended.set()

    monkeypatch.setattr(Transport, "open", watched)

    async def leave() -> bool:
        async with AsyncClient(service.api_key, service.url) as twin:
            frames = twin.jobs.stream(job.id)
            async for _ in frames:
                assert not ended.is_set()
                break
            await frames.aclose()  # type: ignore[attr-defined] # an asynchronous generator
            return await asyncio.to_thread(ended.wait, 5)

    assert asyncio.run(leave())
    client.jobs.cancel(job.id)


def test_new_metrics_and_log_lines_come_while_a_job_is_followed(
    client: Client, trained: Any
) -> None:
    followed = iter(client.jobs.stream_metrics(trained.job_id, poll_seconds=0.01))
    assert next(followed).series["dar/rewards_mean"].value == [0.5]
    frame = client.jobs.metrics(trained.job_id).to_pandas()
    assert frame.index.name == "step"
    assert frame["dar/rewards_mean"].to_list() == [0.5]
    assert frame["dar/loss"].isna().all()


def test_the_examples_about_errors_and_the_asynchronous_client_run(
    service: Any, prompts: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a reader would run them."""
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAR_API_KEY", service.api_key)
    monkeypatch.setenv("DAR_BASE_URL", service.url)
    Path("prompts.jsonl").write_bytes(prompts)
    names: dict[str, Any] = {}
    variables = {"DAR_URL": service.url, "DAR_API_KEY": service.api_key, "PATH": os.defpath}
    for language, text in BLOCKS:
        if language == "python":
            used = text.replace('"my-model"', '"tiny"').replace("127.0.0.1:9000", "127.0.0.1:61999")
            exec(used, names)
        else:
            done = subprocess.run(
                ["bash", "-ec", text], env=variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, (text, done.stderr)
            assert done.stdout
    names["client"].close()
