"""The secret that signs a project's requests to reward services that jobs name by URL."""

from dar.client.transport import Transport
from dar.protocol.reward_secret import NewProjectRewardSecret, ProjectRewardSecret

PATH = "/reward_secret"


class OwnRewardSecret:
    """The project's reward secret: ``client.reward_secret``.

    Registered endpoints have secrets of their own (``client.reward_endpoints``).
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def retrieve(self) -> ProjectRewardSecret:
        """Which secrets sign requests, as fingerprints."""
        return self._transport.get(PATH, ProjectRewardSecret)

    def rotate(self, *, keep_old_secret_active_for_24_hours: bool = True) -> NewProjectRewardSecret:
        """Make a new secret; ``signing_secret`` of the response shows it, only this once.

        Running attempts sign with the old one until they end.

        Args:
            keep_old_secret_active_for_24_hours: Whether attempts that start within a day sign with
                the old secret too.

        Raises:
            PermissionDeniedError: The client's key lacks the scope ``admin``.
        """
        body = {"keep_old_secret_active_for_24_hours": keep_old_secret_active_for_24_hours}
        return self._transport.post(f"{PATH}/rotate", NewProjectRewardSecret, body=body)
