"""Tables of registered reward endpoints and their secrets."""

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from service.store.columns import Base, Id


class RewardEndpoint(Base):
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


class RewardSecret(Base):
    """A secret of an endpoint, encrypted (`service.secrets`)."""

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


class JobEndpoint(Base):
    """A component of a job that names an endpoint."""

    __tablename__ = "job_endpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    component: Mapped[str] = mapped_column(String(32), primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("reward_endpoints.id"), index=True)


class SecretKey(Base):
    """Digest of a key that hosts store secrets under: one that lacks it is told so at its start."""

    __tablename__ = "secret_keys"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[datetime]
