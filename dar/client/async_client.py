"""`AsyncClient`: the methods of `Client` for programs with an event loop."""

from collections.abc import Callable
from typing import Self

import httpx2
from pydantic import SecretStr

from dar.client.api_keys import ApiKeys
from dar.client.arguments import HasId
from dar.client.asynchronous import AsyncResource, Threads, called, followed, listed
from dar.client.checkpoints import Checkpoints
from dar.client.client import Client
from dar.client.files import Files
from dar.client.jobs import Jobs
from dar.client.models import Models
from dar.client.reward_endpoints import RewardEndpoints
from dar.client.reward_secret import OwnRewardSecret
from dar.client.uploads import Uploads
from dar.client.waiting import OnPause, ended
from dar.client.workers import Workers
from dar.protocol.jobs import Job
from dar.protocol.retention import RetentionPreview


class AsyncFiles(AsyncResource[Files]):
    """Training files: ``client.files``."""

    create = called(Files.create)
    list = listed(Files.list)
    retrieve = called(Files.retrieve)
    content = called(Files.content)
    validate = called(Files.validate)
    delete = called(Files.delete)


class AsyncUploads(AsyncResource[Uploads]):
    """Training files that are sent in parts: ``client.uploads``."""

    upload_file = called(Uploads.upload_file)
    create = called(Uploads.create)
    retrieve = called(Uploads.retrieve)
    create_part = called(Uploads.create_part)
    complete = called(Uploads.complete)
    cancel = called(Uploads.cancel)


class AsyncJobs(AsyncResource[Jobs]):
    """Training jobs: ``client.jobs``."""

    create = called(Jobs.create)
    validate = called(Jobs.validate)
    retrieve = called(Jobs.retrieve)
    list = listed(Jobs.list)
    config = called(Jobs.config)
    fork = called(Jobs.fork)
    rerun = called(Jobs.rerun)
    update = called(Jobs.update)
    cancel = called(Jobs.cancel)
    pause = called(Jobs.pause)
    start = called(Jobs.start)
    stop = called(Jobs.stop)
    resume = called(Jobs.resume)
    delete = called(Jobs.delete)
    watch = followed(Jobs.watch)
    events = listed(Jobs.events)
    stream = followed(Jobs.stream)
    poll_events = called(Jobs.poll_events)
    attempts = listed(Jobs.attempts)
    log = called(Jobs.log)
    follow_log = followed(Jobs.follow_log)
    metrics = called(Jobs.metrics)
    export_metrics = called(Jobs.export_metrics)
    metric_names = called(Jobs.metric_names)
    compare_metrics = called(Jobs.compare_metrics)
    stream_metrics = followed(Jobs.stream_metrics)
    reward_stats = called(Jobs.reward_stats)
    reward_failures = listed(Jobs.reward_failures)
    samples = listed(Jobs.samples)
    sample = called(Jobs.sample)

    async def wait(
        self,
        job_id: str | HasId,
        *,
        on_progress: Callable[[Job], None] | None = None,
        on_pause: OnPause = "return",
        poll_seconds: float = 1.0,
        timeout_seconds: float | None = None,
    ) -> Job:
        """Wait until a job ends, as `Jobs.wait` does; a wait holds no thread.

        job = await client.jobs.wait(job.id, on_progress=lambda job: print(job.progress.step))
        """
        last: Job | None = None
        async for last in self.watch(
            job_id, on_pause=on_pause, poll_seconds=poll_seconds, timeout_seconds=timeout_seconds
        ):
            if on_progress is not None:
                on_progress(last)
        return ended(last)


class AsyncCheckpoints(AsyncResource[Checkpoints]):
    """Checkpoints of jobs: ``client.checkpoints``."""

    list = listed(Checkpoints.list)
    retrieve = called(Checkpoints.retrieve)
    pin = called(Checkpoints.pin)
    unpin = called(Checkpoints.unpin)
    update = called(Checkpoints.update)
    promote = called(Checkpoints.promote)
    delete = called(Checkpoints.delete)
    download = called(Checkpoints.download)


class AsyncModels(AsyncResource[Models]):
    """Base models and fine-tuned ones: ``client.models``."""

    list = listed(Models.list)
    retrieve = called(Models.retrieve)
    delete = called(Models.delete)
    download = called(Models.download)


class AsyncRewardEndpoints(AsyncResource[RewardEndpoints]):
    """Registered reward services: ``client.reward_endpoints``."""

    create = called(RewardEndpoints.create)
    list = listed(RewardEndpoints.list)
    retrieve = called(RewardEndpoints.retrieve)
    update = called(RewardEndpoints.update)
    delete = called(RewardEndpoints.delete)
    rotate_secret = called(RewardEndpoints.rotate_secret)
    purge_cache = called(RewardEndpoints.purge_cache)
    probe = called(RewardEndpoints.probe)
    stats = called(RewardEndpoints.stats)


class AsyncOwnRewardSecret(AsyncResource[OwnRewardSecret]):
    """The secret of the project: ``client.reward_secret``."""

    retrieve = called(OwnRewardSecret.retrieve)
    rotate = called(OwnRewardSecret.rotate)


class AsyncWorkers(AsyncResource[Workers]):
    """Workers, and orders to them: ``client.workers``."""

    list = listed(Workers.list)
    drain = called(Workers.drain)
    ban = called(Workers.ban)
    admit = called(Workers.admit)


class AsyncApiKeys(AsyncResource[ApiKeys]):
    """Keys of the project and of workers: ``client.api_keys``."""

    create = called(ApiKeys.create)
    list = listed(ApiKeys.list)
    retrieve = called(ApiKeys.retrieve)
    revoke = called(ApiKeys.revoke)


class AsyncClient:
    """A connection to a DAR service for programs with an event loop.

        async with dar.AsyncClient() as client:
            async for job in client.jobs.list(status="running"):
                print(job.id, job.progress.percent)

    It has the resources, methods, arguments and errors of `Client`. Methods are awaited; lists,
    and what comes over time, are read with ``async for``. Requests run in threads of the client,
    32 at most at the same time.

    Args:
        api_key: As of `Client`.
        base_url: As of `Client`.
        timeout: As of `Client`.
        max_retries: As of `Client`.

    Raises:
        ConfigurationError: As of `Client`.
    """

    def __init__(
        self,
        api_key: str | SecretStr | None = None,
        base_url: str | httpx2.URL | None = None,
        *,
        timeout: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        self._client = Client(api_key, base_url, timeout=timeout, max_retries=max_retries)
        self._threads = Threads()
        self.files = AsyncFiles(self._client.files, self._threads)
        """Training files."""
        self.uploads = AsyncUploads(self._client.uploads, self._threads)
        """Training files that are sent in parts."""
        self.jobs = AsyncJobs(self._client.jobs, self._threads)
        """Training jobs, their metrics, samples and events."""
        self.checkpoints = AsyncCheckpoints(self._client.checkpoints, self._threads)
        """Checkpoints of jobs."""
        self.models = AsyncModels(self._client.models, self._threads)
        """Models that jobs can start from."""
        self.reward_endpoints = AsyncRewardEndpoints(self._client.reward_endpoints, self._threads)
        """Registered reward services."""
        self.reward_secret = AsyncOwnRewardSecret(self._client.reward_secret, self._threads)
        """Signs requests to reward services that jobs name by URL."""
        self.workers = AsyncWorkers(self._client.workers, self._threads)
        """Workers, and orders to them."""
        self.api_keys = AsyncApiKeys(self._client.api_keys, self._threads)
        """API keys of users and workers."""

    @property
    def base_url(self) -> str:
        """URL of the service, without ``/v1``."""
        return self._client.base_url

    async def retention_preview(self) -> RetentionPreview:
        """What the service would delete now, as `Client.retention_preview` says."""
        return await self._threads.run(self._client.retention_preview)

    async def close(self) -> None:
        """Close all connections; the client cannot be used afterwards."""
        self._client.close()
        self._threads.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
