"""The asynchronous client: the same resources, methods and arguments, through a live service."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest

import dar
from dar.client import AsyncClient, AsyncListing, Client, Listing
from dar.errors import ConflictError, InvalidRequestError, NotFoundError
from dar.protocol.jobs import Job


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


def test_new_metrics_and_log_lines_come_while_a_job_is_followed(
    client: Client, trained: Any
) -> None:
    followed = iter(client.jobs.stream_metrics(trained.job_id, poll_seconds=0.01))
    assert next(followed).series["dar/rewards_mean"].value == [0.5]
    frame = client.jobs.metrics(trained.job_id).to_pandas()
    assert frame.index.name == "step"
    assert frame["dar/rewards_mean"].to_list() == [0.5]
    assert frame["dar/loss"].isna().all()
