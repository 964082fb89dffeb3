"""The client: where the service is, with which key, and one attribute per kind of object."""

from types import TracebackType
from typing import Self

from dar.client.checkpoints import Checkpoints
from dar.client.files import Files
from dar.client.jobs import Jobs
from dar.client.models import Models
from dar.client.reward_endpoints import RewardEndpoints
from dar.client.transport import Transport
from dar.errors import ConfigurationError
from dar.settings import load_settings
from dar.version import __version__


class Client:
    """A connection to a DAR service; safe to share between threads.

        with dar.Client() as client:
            for job in client.jobs.list(status="running"):
                print(job.id, job.progress.percent)

    Every method raises the errors of `dar.errors`, as the service raised them, with their
    ``request_id``, and `ServiceConnectionError` when the service cannot be reached.

    Args:
        api_key: ``dar-sk-…``; default: ``DAR_API_KEY``, else the content of ``$DAR_HOME/api_key``.
        base_url: Where the service is, with or without ``/v1``; default: ``DAR_BASE_URL``, else the
            host and port of the installation in the environment.
        timeout: Seconds between two pieces of an answer; connecting gets 5 s at most.
        max_retries: How often a request is repeated after a passing failure.

    Raises:
        ConfigurationError: There is no API key.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        timeout: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        if api_key is None or base_url is None:
            settings = load_settings()
            base_url = base_url or settings.service_url
            if api_key is None:
                api_key = settings.secret_from(settings.api_key, "api_key")
            if not api_key:
                raise ConfigurationError(
                    f"no API key: pass api_key=, set DAR_API_KEY, or start the service once (`dar up`), "
                    f"which writes one to {settings.home / 'api_key'}"
                )
        self._transport = Transport(
            api_key,
            base_url,
            timeout=timeout,
            max_retries=max_retries,
            headers={"accept": "application/json", "user-agent": f"dar-sdk/{__version__}"},
            follow_redirects=True,
        )
        self.files = Files(self._transport)
        """Training files."""
        self.jobs = Jobs(self._transport)
        """Training jobs, their metrics, samples and events."""
        self.checkpoints = Checkpoints(self._transport)
        """What jobs have trained."""
        self.models = Models(self._transport)
        """What jobs can start from."""
        self.reward_endpoints = RewardEndpoints(self._transport)
        """Registered reward services."""

    @property
    def base_url(self) -> str:
        """Where the service is, without ``/v1``."""
        return self._transport.base_url

    def close(self) -> None:
        """Close all connections; the client is not used afterwards."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
