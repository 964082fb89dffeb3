"""Tables of reward endpoints, their secrets, and requests whose results come later."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.store.columns import Base, Id


class RewardEndpointRow(Base):
    """A registered reward service. A deleted one keeps its row for the jobs that named it."""

    __tablename__ = "reward_endpoints"
    __table_args__ = (
        CheckConstraint("state IN ('ok', 'misconfigured')", name="state"),
        Index(None, "project_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(64))
    url: Mapped[str] = mapped_column(String(2048))
    protocol: Mapped[str] = mapped_column(String(32))
    options: Mapped[dict[str, Any]]
    """The fields of a component that were sent, except ``protocol``."""
    revision: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    last_probe: Mapped[dict[str, Any] | None]
    """The latest report, without requests and answers."""
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]


class RewardSecretRow(Base):
    """A secret of an endpoint, encrypted (`service.secret_box`)."""

    __tablename__ = "reward_secrets"
    __table_args__ = (
        CheckConstraint("kind IN ('signing', 'header')", name="kind"),
        Index(None, "endpoint_id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("reward_endpoints.id"))
    kind: Mapped[str] = mapped_column(String(8))
    name: Mapped[str | None] = mapped_column(String(128))
    """Name of the header, in lower case."""
    token: Mapped[str] = mapped_column(Text)
    fingerprint: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    """When a replaced signing secret stops signing beside the new one."""


class JobEndpointRow(Base):
    """A component of a job that names an endpoint."""

    __tablename__ = "job_endpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    component: Mapped[str] = mapped_column(String(32), primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("reward_endpoints.id"), index=True)


class InstallationSecretRow(Base):
    """A secret that the service needs itself, encrypted (`service.store.project_secrets`)."""

    __tablename__ = "installation_secrets"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    token: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime]


class SecretKeyRow(Base):
    """Digest of a key that encrypts secrets; a host without the key fails at its start."""

    __tablename__ = "secret_keys"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[datetime]


class RewardRequestRow(Base):
    """A request to a reward service whose result may come later, by a callback.

    All writes happen under the lock of the job's row, so that the results of a job are numbered in
    the order of their commits.
    """

    __tablename__ = "reward_requests"
    __table_args__ = (
        CheckConstraint("state IN ('waiting', 'done', 'closed', 'burned')", name="state"),
        UniqueConstraint("job_id", "result_id"),
        Index(None, "deadline"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    """The newest attempt that announced the request; it gets the result."""
    component: Mapped[str] = mapped_column(String(128))
    step: Mapped[int]
    sample_ids: Mapped[list[str]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(8))
    """``waiting``; ``done``: a result is stored; ``closed``: the result came another way;
    ``burned``: too many invalid results.
    """
    deadline: Mapped[datetime]
    token_hashes: Mapped[str] = mapped_column(Text)
    """SHA-256 of the valid tokens, newest last; each announcing attempt has its own."""
    is_signature_required: Mapped[bool]
    is_accepted: Mapped[bool] = mapped_column(default=False)
    """The reward service answered 202."""
    poll_url: Mapped[str | None] = mapped_column(Text)
    """Encrypted (`service.secret_box`): a reward service may put a token into it."""
    result_id: Mapped[int | None]
    """Number of the result within the job."""
    body_hash: Mapped[str | None] = mapped_column(String(64))
    result: Mapped[str | None] = mapped_column(Text)
    """The body as it was received; one with secrets is stored without them."""
    invalid_count: Mapped[int] = mapped_column(default=0)
    last_error: Mapped[str | None] = mapped_column(Text)
    """Why the latest callback was not accepted."""
    reported: Mapped[str] = mapped_column("told", String(64), default="")
    """Failed callbacks that have an event already, as words."""


class RewardDeliveryRow(Base):
    """A signed callback that was seen: its ``webhook-id`` is valid for one body of one request.

    Its id is the digest of the ``webhook-id``.
    """

    __tablename__ = "reward_deliveries"
    __table_args__ = (Index(None, "seen_at"),)

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    request_id: Mapped[str] = mapped_column(Id)
    body_hash: Mapped[str] = mapped_column(String(64))
    seen_at: Mapped[datetime]
