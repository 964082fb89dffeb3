"""`Client`: a service, an API key, and one attribute per kind of object."""

from typing import Self

import httpx2
from pydantic import SecretStr

from dar.client.api_keys import ApiKeys
from dar.client.arguments import key_of, url_of
from dar.client.checkpoints import Checkpoints
from dar.client.files import Files
from dar.client.jobs import Jobs
from dar.client.models import Models
from dar.client.reward_endpoints import RewardEndpoints
from dar.client.reward_secret import OwnRewardSecret
from dar.client.transport import Transport
from dar.client.uploads import Uploads
from dar.client.workers import Workers
from dar.errors import ConfigurationError
from dar.protocol.retention import RetentionPreview
from dar.settings import load_settings
from dar.version import __version__


class Client:
    """A connection to a DAR service; safe to share between threads.

        with dar.Client() as client:
            for job in client.jobs.list(status="running"):
                print(job.id, job.progress.percent)

    Every method raises the errors of `dar.errors` with the classes and the ``request_id`` of the
    service. It raises `ServiceConnectionError` when the service cannot be reached.

    Args:
        api_key: ``dar-sk-…``; default: ``DAR_API_KEY``, else the content of
            ``$DAR_HOME/api_key``.
        base_url: URL of the service, with or without ``/v1``; default: ``DAR_BASE_URL``, else
            ``DAR_HOST`` and ``DAR_PORT``.
        timeout: Seconds between two parts of a response; connecting gets 5 s at most.
        max_retries: How often a request is repeated after a passing failure.

    Raises:
        ConfigurationError: There is no API key, ``base_url`` is not a URL of a host and a path, or
            another argument is out of range.
    """

    def __init__(
        self,
        api_key: str | SecretStr | None = None,
        base_url: str | httpx2.URL | None = None,
        *,
        timeout: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        key = None if api_key is None else key_of(api_key)
        url = None if base_url is None else url_of(base_url)
        if key is None or url is None:
            settings = load_settings()
            url = url or settings.service_url
            if key is None:
                key = settings.secret_from(settings.api_key, "api_key")
            if not key:
                raise ConfigurationError(
                    "no API key: pass api_key=, set DAR_API_KEY, or start the service once "
                    f"(`dar up`), which writes one to {settings.home / 'api_key'}"
                )
        self._transport = Transport(
            key,
            url,
            timeout=timeout,
            max_retries=max_retries,
            headers={"accept": "application/json", "user-agent": f"dar-sdk/{__version__}"},
            follow_redirects=True,
        )
        self.files = Files(self._transport)
        """Training files."""
        self.uploads = Uploads(self._transport)
        """Training files that are sent in parts."""
        self.jobs = Jobs(self._transport)
        """Training jobs, their metrics, samples and events."""
        self.checkpoints = Checkpoints(self._transport)
        """Checkpoints of jobs."""
        self.models = Models(self._transport)
        """Models that jobs can start from."""
        self.reward_endpoints = RewardEndpoints(self._transport)
        """Registered reward services."""
        self.reward_secret = OwnRewardSecret(self._transport)
        """Signs requests to reward services that jobs name by URL."""
        self.workers = Workers(self._transport)
        """Workers, and orders to them."""
        self.api_keys = ApiKeys(self._transport)
        """API keys of users and workers."""

    @property
    def base_url(self) -> str:
        """URL of the service, without ``/v1``."""
        return self._transport.base_url

    def retention_preview(self) -> RetentionPreview:
        """What the service would delete now, by the ages and sizes of its settings.

        Raises:
            PermissionDeniedError: The key lacks the scope ``admin``.
        """
        return self._transport.get("/retention", RetentionPreview)

    def close(self) -> None:
        """Close all connections; the client cannot be used afterwards."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
