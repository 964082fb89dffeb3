"""All settings, in one frozen class, read from the environment with the prefix ``DAR_``.

Settings are read only where a process starts (`load_settings`), then passed down. Reading the
environment anywhere else is a lint error. Every process of the product uses the same class, so one
environment describes one installation.
"""

import ipaddress
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dar.errors import ConfigurationError


def _split(value: object) -> object:
    """Make a tuple of comma-separated text."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _starting_with(*schemes: str) -> AfterValidator:
    def check(url: SecretStr) -> SecretStr:
        if not url.get_secret_value().startswith(schemes):
            raise ValueError(f"must start with one of {', '.join(schemes)}")
        return url

    return AfterValidator(check)


def plain_key(key: str) -> str:
    """``key`` without the spaces and line breaks around it.

    Raises:
        ValueError: It has more than 256 characters, or one that is not visible ASCII. The message
            does not show it.
    """
    plain = key.strip()
    if len(plain) > MAX_KEY or not all("!" <= ch <= "~" for ch in plain):
        raise ValueError(
            f"a key is at most {MAX_KEY} visible ASCII characters, but this one has more, or has a "
            "space, a line break or another character in it; copy it again"
        )
    return plain


def _key(key: SecretStr) -> SecretStr:
    return SecretStr(plain_key(key.get_secret_value()))


def _hub_token(token: SecretStr | None) -> SecretStr | None:
    """``token`` without spaces around it; None if nothing is left.

    Raises:
        ValueError: No header can carry it. The message does not show it.
    """
    plain = "" if token is None else token.get_secret_value().strip()
    if not all("!" <= ch <= "~" for ch in plain):
        raise ValueError(
            "a token of the hub (DAR_HF_TOKEN, else HF_TOKEN) is visible ASCII characters, but this "
            "one has a space, a line break or another character in it; copy it again"
        )
    return SecretStr(plain) if plain else None


def _network(cidr: str) -> str:
    ipaddress.ip_network(cidr)
    return cidr


MAX_KEY = 256
"""Longest API key or worker key, in characters."""

Key = Annotated[SecretStr, AfterValidator(_key)]
HubToken = Annotated[SecretStr | None, AfterValidator(_hub_token)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]
Folder = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Ports = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split)]
Networks = Annotated[
    tuple[Annotated[str, AfterValidator(_network)], ...], NoDecode, BeforeValidator(_split)
]
DatabaseURL = Annotated[
    SecretStr, _starting_with("sqlite:///", "postgresql://", "postgresql+psycopg://")
]
BrokerURL = Annotated[SecretStr, _starting_with("redis://", "rediss://")]


class Settings(BaseSettings):
    """Settings of one installation. The field ``port`` is the variable ``DAR_PORT``."""

    model_config = SettingsConfigDict(
        env_prefix="DAR_", frozen=True, extra="ignore", populate_by_name=True
    )

    home: Folder = Field(default=Path("~/.local/share/dar"))
    """Folder of all stored data: database, artifacts, keys, models, the worker's spool."""

    cache_home: Folder = Field(default=Path("~/.cache"), validation_alias="XDG_CACHE_HOME")
    """Folder of data that can be made again: the demo's base model."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of log lines that are written: debug, info, warning or error."""

    # --- address of the service, for clients and workers
    base_url: str | None = None
    """URL under which clients and workers reach the service; default: ``http://host:port``."""

    public_url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")] | None = None
    """URL under which reward services reach the service, for callbacks; default: the
    URL for clients and workers."""

    host: str = "127.0.0.1"
    """Address to which the service binds."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8321
    """Port to which the service binds."""

    api_key: Key | None = None
    """API key that the service accepts, and that the SDK and the CLI send; default: the content of
    ``$DAR_HOME/api_key``."""

    # --- service
    database_url: DatabaseURL | None = None
    """SQLAlchemy URL (``postgresql+psycopg://…``); default: SQLite at ``$DAR_HOME/dar.db``."""

    broker_url: BrokerURL | None = None
    """``redis://…`` URL of the Valkey or Redis that wakes workers; default: workers only poll."""

    models_dir: Folder | None = None
    """Folder of base models that a job may name; default: ``$DAR_HOME/models``."""

    artifacts_dir: Folder | None = None
    """Folder of uploaded files and checkpoints; default: ``$DAR_HOME/artifacts``."""

    hub_models: Names = ("*/*",)
    """Comma-separated patterns of hub models that a job may name, like ``Qwen/*``."""

    hub_datasets: Names = ("*/*",)
    """Comma-separated patterns of hub data sets that a job may name as ``hf://…``, like
    ``trl-lib/*``."""

    reward_secret: SecretStr | None = None
    """Secret (``whsec_…``) that signs requests to inline reward URLs; default: the content of
    ``$DAR_HOME/reward_secret``."""

    egress_allow_hosts: Names = ()
    """Comma-separated hosts of reward services that may have private addresses, like
    ``rewards.internal,*.corp.example``."""

    egress_allow_cidrs: Networks = ()
    """Comma-separated private networks that reward services may be in, like ``10.20.0.0/16``. The
    metadata addresses of clouds stay blocked."""

    egress_allow_http: Names = ()
    """Comma-separated hosts of reward services that may use plain HTTP; ``*``: all hosts."""

    egress_ports: Ports = ()
    """Comma-separated ports that reward services may use; default: 443, 80 for plain HTTP, and all
    from 1024 on."""

    is_migrating: bool = True
    """Whether the service upgrades the database schema when it starts."""

    database_wait_seconds: Seconds = 60.0
    """How long the service waits for its database when it starts."""

    secret_keys: SecretStr | None = None
    """Comma-separated Fernet keys that encrypt the secrets of reward endpoints, the newest first;
    default: the content of ``$DAR_HOME/secret_keys``."""

    max_body_bytes: Bytes = 1024**2
    """Largest JSON body of a request, in bytes."""

    max_file_bytes: Bytes = 512 * 1024**2
    """Largest uploaded training file, in bytes."""

    max_batch_bytes: Bytes = 16 * 1024**2
    """Largest body of reports that a worker sends, in bytes after decompression."""

    # --- leases
    lease_ttl_seconds: Seconds = 300.0
    """How long a worker may send no heartbeat before another worker gets its job."""

    reconcile_seconds: Seconds = 5.0
    """Pause between two passes that expire leases, wake queues and remove old checkpoints."""

    reward_probe_seconds: Seconds = 5.0
    """Pause before the service again probes the reward service of a job that is paused or waiting
    for rewards. After each probe that fails the pause doubles, to at most 12 x this value. An
    attempt without a reward after a probe that passed makes the next pause 4 times as long, to at
    most 120 x this value. If the reward service of a paused job rejected requests or returned
    invalid responses, every pause is at least 12 times as long."""

    # --- worker
    worker_key: Key | None = None
    """Key of scope ``worker`` that the service accepts, and that workers send; default: the content
    of ``$DAR_HOME/worker_key``."""

    node: str = Field(default_factory=platform.node)
    """Name of this machine, the same after a restart."""

    slot: str = "0"
    """Name of the worker's slot on its node. Each slot has one worker process."""

    devices: str | None = None
    """GPUs of the slot, in the format of ``CUDA_VISIBLE_DEVICES``; default: all."""

    work_dir: Folder | None = None
    """Folder of the worker's spools, inputs and local checkpoints; default:
    ``$DAR_HOME/worker``."""

    reward_cache_bytes: Bytes = 256 * 1024**2
    """Size limit of one reward cache, of a job or of an endpoint, in bytes. The least recently used
    rewards are removed first."""

    heartbeat_seconds: Seconds = 15.0
    """Pause between two renewals of a lease."""

    poll_seconds: Seconds = 10.0
    """Pause between two polls for queued jobs when no wake-up arrives."""

    spool_seconds: Seconds = 1.0
    """Longest time that a trainer's reports wait before they are sent."""

    drain_seconds: Seconds = 120.0
    """How long a trainer may take to write a checkpoint and end when its worker is stopped."""

    cancel_seconds: Seconds = 30.0
    """How long a trainer may take to stop after a cancellation before it is killed."""

    torch_threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of a trainer. A repeated run gives equal results only with the same number."""

    is_offline: bool = Field(default=False)
    """Whether trainers must not use the model hub."""

    hf_token: HubToken = Field(
        default=None, validation_alias=AliasChoices("DAR_HF_TOKEN", "HF_TOKEN")
    )
    """Token of the model hub with which trainers load gated and private models; without
    ``DAR_HF_TOKEN`` it is that in ``HF_TOKEN``, and without both the one of ``hf auth login``."""

    @property
    def service_url(self) -> str:
        """URL of the service, without a slash at its end."""
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def callback_url(self) -> str:
        """URL for callbacks of reward services, without a slash at its end."""
        return f"{(self.public_url or self.service_url).rstrip('/')}/v1/reward_callbacks"

    @property
    def sqlalchemy_url(self) -> str:
        if self.database_url is None:
            return f"sqlite:///{self.home / 'dar.db'}"
        return self.database_url.get_secret_value()

    @property
    def models_path(self) -> Path:
        return self.models_dir or self.home / "models"

    @property
    def artifacts_path(self) -> Path:
        return self.artifacts_dir or self.home / "artifacts"

    @property
    def work_path(self) -> Path:
        return self.work_dir or self.home / "worker"

    def secret_from(self, value: SecretStr | None, filename: str) -> str | None:
        """``value``, else the content of ``$DAR_HOME/<filename>``, else None."""
        if value is not None:
            return value.get_secret_value().strip()
        path = self.home / filename
        return path.read_text("utf-8", "replace").strip() if path.is_file() else None


def load_settings(**given: object) -> Settings:
    """The settings of this process, from its environment and its command line.

    Args:
        **given: Values of the command line by field name; None: not given.

    Raises:
        ConfigurationError: A variable is invalid; the message names it.
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
    """The environment of this process, changed for a child.

    Args:
        without: Settings, by field name, that the child must not get.
        **changes: Settings by field name; None: unchanged.
    """
    given = {_variable(name): str(value) for name, value in changes.items() if value is not None}
    withheld = {_variable(name) for name in without}
    kept = {name: value for name, value in os.environ.items() if name not in withheld}
    return {**kept, **given}


def own_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """All variables of this process with changes, for a child that does the same work."""
    return {**os.environ, **changes}


def inherited_environment(names: Iterable[str]) -> dict[str, str]:
    """The variables of ``names`` that this process has, for a child that gets no others."""
    return {name: os.environ[name] for name in names if name in os.environ}


def forget_environment(name: str) -> None:
    """Unset a variable of this process that a library has set for itself."""
    os.environ.pop(name, None)
