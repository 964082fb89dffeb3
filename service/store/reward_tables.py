"""Tables of registered reward endpoints, their secrets, and requests to reward services that are answered later."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.store.columns import Base, Id


class RewardEndpointRow(Base):
    """A user's reward service. A deleted one keeps its row, for the jobs that named it."""

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
    """The endpoint's fields of a component that were sent, ``protocol`` aside."""
    revision: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    last_probe: Mapped[dict[str, Any] | None]
    """The latest report, without what was sent and answered."""
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
    """Until when a replaced signing secret is used beside its successor."""


class JobEndpointRow(Base):
    """A component of a job that names an endpoint."""

    __tablename__ = "job_endpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    component: Mapped[str] = mapped_column(String(32), primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("reward_endpoints.id"), index=True)


class SecretKeyRow(Base):
    """Digest of a key that hosts store secrets under: one that lacks it is told so at its start."""

    __tablename__ = "secret_keys"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[datetime]


class RewardRequestRow(Base):
    """A request to a reward service that may be answered later, by a callback.

    All writes happen under the lock of the job's row, so that results of a job are numbered in the order of their commits.
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
    """The newest that announced it, and that is told the result."""
    component: Mapped[str] = mapped_column(String(128))
    step: Mapped[int]
    sample_ids: Mapped[list[str]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(8))
    """``waiting``; ``done``: a result is stored; ``closed``: answered on another way; ``burned``: too many invalid results."""
    deadline: Mapped[datetime]
    token_hashes: Mapped[str] = mapped_column(Text)
    """SHA-256 of the tokens that open it, newest last: each attempt that announces it has one of its own."""
    is_signature_required: Mapped[bool]
    is_accepted: Mapped[bool] = mapped_column(default=False)
    """The reward service answered 202."""
    poll_url: Mapped[str | None] = mapped_column(Text)
    result_id: Mapped[int | None]
    """Number of the directive that carries the result; counts within the job."""
    body_hash: Mapped[str | None] = mapped_column(String(64))
    result: Mapped[str | None] = mapped_column(Text)
    """The body as it was sent."""
    invalid_count: Mapped[int] = mapped_column(default=0)
    last_error: Mapped[str | None] = mapped_column(Text)
    told: Mapped[str] = mapped_column(String(64), default="")
    """Mishaps that have their event already, as words."""


class RewardDeliveryRow(Base):
    """A signed callback that was seen: its ``webhook-id`` is good for one body of one request."""

    __tablename__ = "reward_deliveries"
    __table_args__ = (Index(None, "seen_at"),)

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    request_id: Mapped[str] = mapped_column(Id)
    body_hash: Mapped[str] = mapped_column(String(64))
    seen_at: Mapped[datetime]
