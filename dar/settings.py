"""All settings, in one frozen class, read from the environment with the prefix ``DAR_``.

Built only where a process starts (`Settings()`), then passed down; reading the environment anywhere else is a lint error.
Every process of the product uses the same class, so one environment describes one installation.
"""

import ipaddress
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dar.errors import ConfigurationError

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """Settings of one installation. The field ``lease_ttl_seconds`` is the variable ``DAR_LEASE_TTL_SECONDS``."""

    model_config = SettingsConfigDict(
        env_prefix="DAR_", frozen=True, extra="ignore", populate_by_name=True
    )

    home: Path = Field(default=Path("~/.local/share/dar"))
    """Folder of everything that is kept: database, artifacts, keys, models, the worker's spool."""

    cache_home: Path = Field(default=Path("~/.cache"), validation_alias="XDG_CACHE_HOME")
    """Folder of what can be made again: the demo's base model."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line that is written."""

    # --- where the service is, for clients and workers -------------------------------------------------------------
    base_url: str | None = None
    """URL of the service as clients and workers reach it; default ``http://host:port``."""

    public_url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")] | None = None
    """URL of the service as reward services reach it, for callbacks; default: that for clients and workers."""

    host: str = "127.0.0.1"
    """Address the service binds to."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8321
    """Port the service binds to."""

    api_key: SecretStr | None = None
    """API key of the SDK and the CLI; default: the content of ``$DAR_HOME/api_key``."""

    # --- service ---------------------------------------------------------------------------------------------------
    database_url: SecretStr | None = None
    """SQLAlchemy URL (``postgresql+psycopg://…``); default: SQLite at ``$DAR_HOME/dar.db``."""

    broker_url: SecretStr | None = None
    """``redis://…`` of the Valkey or Redis that carries wake-ups; without one, workers poll."""

    models_dir: Path | None = None
    """Folder whose sub-folders are the base models that a job may name; default ``$DAR_HOME/models``."""

    artifacts_dir: Path | None = None
    """Folder of uploaded files and checkpoints; default ``$DAR_HOME/artifacts``."""

    hub_models: Annotated[tuple[str, ...], NoDecode] = ("*/*",)
    """Comma-separated patterns of hub models that a job may name, like ``Qwen/*``."""

    hub_datasets: Annotated[tuple[str, ...], NoDecode] = ("*/*",)
    """Comma-separated patterns of hub data sets that a job may name as ``hf://…``, like ``trl-lib/*``."""

    reward_secret: SecretStr | None = None
    """Secret (``whsec_…``) that signs requests to inline reward URLs; default: ``$DAR_HOME/reward_secret``."""

    egress_allow_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma-separated hosts of reward services whose addresses may be private, like ``rewards.internal,*.corp.example``."""

    egress_allow_cidrs: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma-separated networks in which reward services may be though they are not public, like ``10.20.0.0/16``; the metadata
    addresses of clouds stay blocked."""

    egress_allow_http: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma-separated hosts of reward services that may be reached over plain HTTP; ``*`` for all."""

    egress_ports: Annotated[tuple[int, ...], NoDecode] = ()
    """Comma-separated ports that reward services may have; default: 443, 80 for plain HTTP, and 1024 and above."""

    is_migrating: bool = True
    """Whether the service upgrades the database schema when it starts."""

    database_wait_seconds: Seconds = 60.0
    """How long the service waits for its database when it starts."""

    secret_keys: SecretStr | None = None
    """Comma-separated Fernet keys that the secrets of reward endpoints are stored under, the newest first; default: the content of
    ``$DAR_HOME/secret_keys``."""

    max_body_bytes: Bytes = 1024**2
    """Largest JSON body of a request."""

    max_file_bytes: Bytes = 512 * 1024**2
    """Largest uploaded training file."""

    max_batch_bytes: Bytes = 16 * 1024**2
    """Largest batch of a worker, unpacked."""

    # --- leases ----------------------------------------------------------------------------------------------------
    lease_ttl_seconds: Seconds = 300.0
    """How long a worker may be silent before its job passes to another."""

    reconcile_seconds: Seconds = 5.0
    """Pause between two passes that expire leases, wake queues and remove old checkpoints."""

    reward_probe_seconds: Seconds = 5.0
    """Pause before the service looks whether the reward service of a paused job is back; doubles up to 12 times that. Where the
    reward service refused us or answered wrongly, 12 times longer."""

    # --- worker ----------------------------------------------------------------------------------------------------
    worker_key: SecretStr | None = None
    """Key of scope ``worker``; default: the content of ``$DAR_HOME/worker_key``."""

    node: str = Field(default_factory=platform.node)
    """Name of this machine, the same after a restart."""

    slot: str = "0"
    """Name of this worker's slot on its node; one worker process per slot."""

    devices: str | None = None
    """GPUs of the slot as ``CUDA_VISIBLE_DEVICES`` takes them; default: all."""

    work_dir: Path | None = None
    """Folder of the worker's spools, inputs and local checkpoints; default ``$DAR_HOME/worker``."""

    reward_cache_bytes: Bytes = 256 * 1024**2
    """Remembered rewards in one file, of a job or of an endpoint that jobs share; the least recently used make room."""

    heartbeat_seconds: Seconds = 15.0
    """Pause between two renewals of a lease."""

    poll_seconds: Seconds = 10.0
    """Pause between two looks for queued jobs when no wake-up arrives."""

    spool_seconds: Seconds = 1.0
    """Longest time that what the trainer said waits before it is sent."""

    drain_seconds: Seconds = 120.0
    """How long a trainer may take to checkpoint and leave when its worker is stopped."""

    cancel_seconds: Seconds = 30.0
    """How long a trainer may take to stop after a cancellation before it is killed."""

    torch_threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of a trainer; part of what makes a run reproducible."""

    is_offline: bool = Field(default=False)
    """Whether a trainer may not reach the model hub."""

    @field_validator("home", "cache_home", "models_dir", "artifacts_dir", "work_dir")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @field_validator("egress_allow_cidrs")
    @classmethod
    def _are_networks(cls, cidrs: tuple[str, ...]) -> tuple[str, ...]:
        for cidr in cidrs:
            ipaddress.ip_network(cidr)
        return cidrs

    @field_validator(
        "hub_models",
        "hub_datasets",
        "egress_allow_hosts",
        "egress_allow_cidrs",
        "egress_allow_http",
        "egress_ports",
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("database_url")
    @classmethod
    def _is_database(cls, url: SecretStr | None) -> SecretStr | None:
        schemes = ("sqlite:///", "postgresql://", "postgresql+psycopg://")
        return _starting_with(url, schemes)

    @field_validator("broker_url")
    @classmethod
    def _is_broker(cls, url: SecretStr | None) -> SecretStr | None:
        return _starting_with(url, ("redis://", "rediss://"))

    @property
    def service_url(self) -> str:
        """URL of the service without a slash at its end."""
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def callback_url(self) -> str:
        """URL under which reward services post later answers, without a slash at its end."""
        return f"{(self.public_url or self.service_url).rstrip('/')}/v1/reward_callbacks"

    @property
    def sqlalchemy_url(self) -> str:
        """URL of the database."""
        if self.database_url is None:
            return f"sqlite:///{self.home / 'dar.db'}"
        return self.database_url.get_secret_value()

    @property
    def models_path(self) -> Path:
        """Folder of the base models."""
        return self.models_dir or self.home / "models"

    @property
    def artifacts_path(self) -> Path:
        """Folder of uploaded files and checkpoints."""
        return self.artifacts_dir or self.home / "artifacts"

    @property
    def work_path(self) -> Path:
        """Folder of the worker's own files."""
        return self.work_dir or self.home / "worker"

    def secret_from(self, value: SecretStr | None, filename: str) -> str | None:
        """A secret given in the environment, else the content of ``$DAR_HOME/<filename>``, else None."""
        if value is not None:
            return value.get_secret_value()
        path = self.home / filename
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _starting_with(url: SecretStr | None, schemes: tuple[str, ...]) -> SecretStr | None:
    if url is not None and not url.get_secret_value().startswith(schemes):
        raise ValueError(f"must start with one of {', '.join(schemes)}")
    return url


def load_settings(**given: object) -> Settings:
    """The settings of this process, from its environment and from what its command line gave (None: nothing).

    Raises:
        ConfigurationError: A variable cannot be used; the message names it.
    """
    try:
        return Settings.model_validate(
            {name: value for name, value in given.items() if value is not None}
        )
    except ValidationError as error:
        problems = [
            f"{_variable(str(item['loc'][0]))}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_input=False)
        ]
        raise ConfigurationError("; ".join(problems)) from None


def _variable(name: str) -> str:
    return name if name.isupper() else f"DAR_{name.upper()}"


def environment(without: Iterable[str] = (), /, **changes: object) -> dict[str, str]:
    """This process's environment for a child.

    Args:
        without: Settings, by field name, that the child has no business to know.
        **changes: Settings by field name; None leaves one as it is.
    """
    given = {_variable(name): str(value) for name, value in changes.items() if value is not None}
    withheld = {_variable(name) for name in without}
    kept = {name: value for name, value in os.environ.items() if name not in withheld}
    return {**kept, **given}


def own_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """All variables of this process with some changes, for a child that does the same work."""
    return {**os.environ, **changes}


def inherited_environment(names: Iterable[str]) -> dict[str, str]:
    """The variables among ``names`` that this process has, for a child that may see no others."""
    return {name: os.environ[name] for name in names if name in os.environ}


def forget_environment(name: str) -> None:
    """Unset a variable of this process that a library has set for itself and left behind."""
    os.environ.pop(name, None)
