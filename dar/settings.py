"""All settings, in one frozen class, read from the environment with the prefix ``DAR_``.

Settings are read only where a process starts (`load_settings`), then passed down. Reading the
environment anywhere else is a lint error. Every process of the product uses the same class, so one
environment describes one installation.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dar.errors import ConfigurationError
from dar.setting_kinds import (
    BrokerURL,
    Bytes,
    CacheFolder,
    DatabaseURL,
    Days,
    Devices,
    Folder,
    Host,
    Hosts,
    HubToken,
    Key,
    Name,
    Names,
    Networks,
    Ports,
    Seconds,
    Secret,
    StorageURL,
    WebURL,
    own_node,
    reachable_url,
)


class SecretFiles(PydanticBaseSettingsSource):
    """Secrets from files: ``DAR_API_KEY_FILE`` names the file with the value of ``DAR_API_KEY``.

    All settings that are secrets have this form, and no other setting does. Container engines and
    systemd give secrets as files, because others can read the environment of a process.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The content of the file of a secret, and the name under which the field takes it.

        Raises:
            ConfigurationError: The file cannot be read, or the secret is given in both forms.
        """
        variable = variable_of(field_name, field)
        path = os.environ.get(f"{variable}_FILE") if is_secret(field.annotation) else None
        if not path:
            return None, field_name, False
        if os.environ.get(variable):
            raise ConfigurationError(
                f"both {variable} and {variable}_FILE are set; unset one of them"
            )
        try:
            content = Path(path).read_text("utf-8").strip()
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigurationError(f"{variable}_FILE: {path} cannot be read: {why}") from None
        return content, field_name if field.validation_alias is None else variable, False

    def __call__(self) -> dict[str, Any]:
        """The secrets that are given as files, for `Settings`."""
        found = (
            self.get_field_value(field, name)
            for name, field in self.settings_cls.model_fields.items()
        )
        return {name: value for value, name, _ in found if value is not None}


def is_secret(kind: object) -> bool:
    """Whether values of this type are secrets."""
    return kind is SecretStr or any(is_secret(part) for part in get_args(kind))


def variable_of(name: str, field: FieldInfo) -> str:
    """The variable of a setting; of several, the first one that is read."""
    alias = field.validation_alias
    return str(
        alias.choices[0] if isinstance(alias, AliasChoices) else alias or f"DAR_{name.upper()}"
    )


class Settings(BaseSettings):
    """Settings of one installation. The field ``port`` is the variable ``DAR_PORT``.

    A key or a secret that is empty, or only spaces, counts as not set.
    """

    model_config = SettingsConfigDict(
        env_prefix="DAR_", frozen=True, extra="ignore", populate_by_name=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the library's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the library's signature
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line, then files of secrets, then the environment."""
        return init_settings, SecretFiles(settings_cls), env_settings

    home: Folder = Field(default=Path("~/.local/share/dar"))
    """Folder of all stored data: database, artifacts, keys, models, the worker's spool."""

    cache_home: CacheFolder = Field(default=Path("~/.cache"), validation_alias="XDG_CACHE_HOME")
    """Folder of data that can be made again: the demo's base model."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of log lines that are written: debug, info, warning or error."""

    # --- address of the service, for clients and workers
    base_url: str | None = None
    """URL under which clients and workers reach the service; default: ``http://host:port``, with a
    loopback address where the service binds to all addresses."""

    public_url: Annotated[str, Field(pattern=r"^https?://[^\s?#@]+$")] | None = None
    """URL under which reward services reach the service, for callbacks; default: the
    URL for clients and workers."""

    host: Host = "127.0.0.1"
    """Address to which the service binds."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8321
    """Port to which the service binds."""

    api_key: Key = None
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
    """Folder of uploaded files and checkpoints, unless ``DAR_STORAGE_URL`` names another place;
    default: ``$DAR_HOME/artifacts``."""

    storage_url: StorageURL | None = None
    """Where uploaded files and checkpoints are kept: ``s3://bucket/prefix``, or a folder; default:
    ``DAR_ARTIFACTS_DIR``. Several hosts need a bucket, or a folder that all of them share."""

    s3_endpoint: str | None = Field(
        default=None,
        validation_alias=AliasChoices("DAR_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    )
    """URL of the S3 store, like ``https://s3.example.com``; default:
    ``AWS_ENDPOINT_URL_S3``, else ``AWS_ENDPOINT_URL``, else AWS itself."""

    s3_public_endpoint: WebURL | None = None
    """URL of the S3 store for workers and users, who get signed URLs of it; default:
    ``DAR_S3_ENDPOINT``."""

    s3_region: str = Field(
        default="us-east-1",
        validation_alias=AliasChoices("DAR_S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
    )
    """Region of the bucket; without ``DAR_S3_REGION`` it is that in ``AWS_REGION`` or
    ``AWS_DEFAULT_REGION``."""

    s3_access_key_id: Secret = None
    """Id of the key to the bucket; default: what AWS's libraries find, in ``AWS_ACCESS_KEY_ID``, in
    the file that ``AWS_SHARED_CREDENTIALS_FILE`` names, or from the machine's role."""

    s3_secret_access_key: Secret = None
    """Secret of the key to the bucket; default: as for ``DAR_S3_ACCESS_KEY_ID``."""

    downloads: Literal["redirect", "stream"] = "redirect"
    """How users get files out of a bucket: redirect sends them to a signed URL of the store, stream
    passes the bytes through the service."""

    transfers: Literal["direct", "stream"] = "direct"
    """How workers send and fetch files of a bucket: direct by signed URLs of the store, stream
    through the service. Use stream if workers cannot reach the store."""

    hub_models: Names = ("*/*",)
    """Comma-separated patterns of hub models that a job may name, like ``Qwen/*``."""

    hub_datasets: Names = ("*/*",)
    """Comma-separated patterns of hub data sets that a job may name as ``hf://…``, like
    ``trl-lib/*``."""

    reward_secret: Secret = None
    """Secret (``whsec_…``) that signs requests to inline reward URLs, or several, separated by
    commas, the newest first; default: the content of ``$DAR_HOME/reward_secret``."""

    egress_allow_hosts: Hosts = ()
    """Comma-separated hosts of reward services that may have private addresses, like
    ``rewards.internal,*.corp.example``."""

    egress_allow_cidrs: Networks = ()
    """Comma-separated private networks that reward services may be in, like ``10.20.0.0/16``. The
    metadata addresses of clouds stay blocked."""

    egress_allow_http: Hosts = ()
    """Comma-separated hosts of reward services that may use plain HTTP; ``*``: all hosts."""

    egress_ports: Ports = ()
    """Comma-separated ports that reward services may use; default: 443, 80 for plain HTTP, and all
    from 1024 on."""

    is_migrating: bool = True
    """Whether the service upgrades the database schema when it starts."""

    database_wait_seconds: Seconds = 60.0
    """How long the service waits for its database when it starts."""

    postgres_bin: Folder | None = None
    """Folder of PostgreSQL's client programs, with which a PostgreSQL database is backed up and
    restored; default: the folders of ``PATH``."""

    secret_keys: Secret = None
    """Comma-separated Fernet keys that encrypt the secrets of reward endpoints, the newest first;
    default: the content of ``$DAR_HOME/secret_keys``."""

    max_body_bytes: Bytes = 1024**2
    """Largest JSON body of a request, in bytes."""

    max_file_bytes: Bytes = 512 * 1024**2
    """Largest uploaded training file, in bytes."""

    max_batch_bytes: Bytes = 16 * 1024**2
    """Largest body of reports that a worker sends, in bytes after decompression."""

    # --- stored checkpoints
    min_free_bytes: Annotated[int, Field(ge=0)] = 256 * 1024**2
    """Bytes that uploads leave free on the volume of the artifacts, for the database and logs. An
    upload that would take them gets a 503 (``storage_full``)."""

    scrub_seconds: Seconds = 7 * 24 * 3600.0
    """How often each stored checkpoint is read and compared with its digests. A damaged one is set
    aside."""

    scrub_bytes_per_second: Bytes = 32 * 1024**2
    """How fast stored checkpoints are read for this comparison, in bytes per second."""
    # --- retention
    jobs_kept_days: Days = 0.0
    """Days after their end after which jobs are deleted, with their checkpoints and models; 0: they
    are kept."""

    events_kept_days: Days = 90.0
    """Days after a job's end after which its events, failed reward requests and the logs of its
    trainers are deleted; 0: they are kept."""

    samples_kept_days: Days = 90.0
    """Days after a job's end after which its samples are deleted; 0: they are kept."""

    samples_bytes: Bytes = 20 * 1024**3
    """Size limit of the samples of all jobs, in bytes. The oldest are deleted first, and the best
    and worst of each step last."""

    job_samples_bytes: Bytes = 1024**3
    """Size limit of the samples of one job, in bytes. The oldest are deleted first, and the best
    and worst of each step last."""

    metrics_kept_days: Days = 0.0
    """Days after a job's end after which its metrics are deleted; 0: they are kept."""

    digests_kept_days: Days = 14.0
    """Days after an attempt's end after which the digests of its reports are deleted; 0: they are
    kept. Until then, altered reports that a worker sends again are recognised."""

    idempotency_keys_kept_days: Days = 30.0
    """Days after which the ``Idempotency-Key`` of a job is forgotten; 0: it is kept."""

    log_bytes: Bytes = 16 * 1024**2
    """Size from which ``dar up`` begins a new log of a process, in bytes. Of each process, the
    newest log and the four before it are kept."""

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
    invalid responses, the pauses begin at 12 x this value and double to at most 144 x it."""

    # --- worker
    worker_key: Key = None
    """Key of scope ``worker`` that the service accepts, and that workers send; default: the content
    of ``$DAR_HOME/worker_key``."""

    node: Name = Field(default_factory=own_node)
    """Name of this machine, the same after a restart."""

    slot: Name = "0"
    """Name of the worker's slot on its node. Each slot has one worker process."""

    devices: Devices = None
    """GPUs of the slot, in the format of ``CUDA_VISIBLE_DEVICES``; default: all."""

    work_dir: Folder | None = None
    """Folder of the worker's spools, inputs and local checkpoints; default:
    ``$DAR_HOME/worker``."""

    min_disk_bytes: Bytes = 1024**3
    """Free disk space, in bytes, below which a worker claims no job."""

    min_memory_bytes: Bytes = 256 * 1024**2
    """Free memory, in bytes, below which a worker claims no job."""

    reward_cache_bytes: Bytes = 256 * 1024**2
    """Size limit of one reward cache, of a job or of an endpoint, in bytes. The least recently used
    rewards are removed first."""

    model_cache_bytes: Annotated[int, Field(ge=0)] = 100 * 1024**3
    """Size limit of the models that the slots of a host have downloaded, in bytes. The least
    recently used are removed first, and none that a job uses; 0: no model is kept after its job."""

    heartbeat_seconds: Seconds = 15.0
    """Pause between two renewals of a lease."""

    poll_seconds: Seconds = 10.0
    """Pause between two polls for queued jobs when no wake-up arrives."""

    spool_seconds: Seconds = 1.0
    """Longest time that a trainer's reports wait before they are sent."""

    spool_bytes: Annotated[int, Field(ge=1024**2)] = 2 * 1024**3
    """Largest size of the reports of one attempt that wait on the worker's disk while the service
    is away, in bytes. From 80% on, only the best and the worst sample of each step are kept; at
    100% training waits."""

    trainer_logs_bytes: Annotated[int, Field(ge=1024**2)] = 512 * 1024**2
    """Largest size of the logs of ended trainers that each slot keeps, in bytes. The oldest are
    removed first, also those beyond the newest 500."""

    drain_seconds: Seconds = 120.0
    """How long a trainer may take to write a checkpoint and end when its worker is stopped."""

    cancel_seconds: Seconds = 30.0
    """How long a trainer may take to stop after a cancellation before it is killed."""

    stall_seconds: Seconds = 600.0
    """Shortest limit for a trainer that makes no progress in a phase: starting, calibrating,
    sampling, training, evaluating or checkpointing. It is then ended, and its job starts again from
    the newest checkpoint. The wait for rewards never counts."""

    stall_factor: Annotated[float, Field(ge=1, le=1e6)] = 20.0
    """The limit is this many times the median time between two reports of the phase so far, if that
    is longer than ``DAR_STALL_SECONDS``."""

    torch_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads of a trainer. A repeated run gives equal results only with the same number."""

    is_offline: bool = Field(default=False)
    """Whether workers and trainers must not use the model hub."""

    fault_points: Folder | None = None
    """Folder in which the chaos suite arms instants at which a process kills itself
    (`dar.fault_points`). Leave it unset."""

    hf_token: HubToken = Field(
        default=None, validation_alias=AliasChoices("DAR_HF_TOKEN", "HF_TOKEN")
    )
    """Token of the model hub with which workers download gated and private models; without
    ``DAR_HF_TOKEN`` it is that in ``HF_TOKEN``, and without both the one of ``hf auth login``."""

    @property
    def service_url(self) -> str:
        """URL of the service, without a slash at its end."""
        return (self.base_url or reachable_url(self.host, self.port)).rstrip("/")

    @property
    def callback_url(self) -> str:
        """URL for callbacks of reward services, without a slash at its end."""
        return f"{(self.public_url or self.service_url).rstrip('/')}/v1/reward_callbacks"

    @property
    def sqlalchemy_url(self) -> str:
        if self.database_url is None:
            return f"sqlite:///{quote(str(self.home / 'dar.db'))}"
        return self.database_url.get_secret_value()

    @property
    def models_path(self) -> Path:
        return self.models_dir or self.home / "models"

    @property
    def artifacts_path(self) -> Path:
        if self.storage_url is not None and not self.storage_url.startswith("s3://"):
            return Path(self.storage_url)
        return self.artifacts_dir or self.home / "artifacts"

    @property
    def work_path(self) -> Path:
        return self.work_dir or self.home / "worker"

    def secret_from(self, value: SecretStr | None, filename: str) -> str | None:
        """``value``, else the content of ``$DAR_HOME/<filename>``, else None."""
        if value is not None:
            return value.get_secret_value()
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
    withheld |= {f"{name}_FILE" for name in (*withheld, *given)}
    kept = {name: value for name, value in os.environ.items() if name not in withheld}
    return {**kept, **given}


def own_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """All variables of this process with changes, for a child that does the same work."""
    return {**os.environ, **changes}


def inherited_environment(names: Iterable[str]) -> dict[str, str]:
    """The variables of ``names`` that this process has, for a child that gets no others."""
    return {name: os.environ[name] for name in names if name in os.environ}


def fault_point_folder() -> Path | None:
    """``DAR_FAULT_POINTS`` of this process; also for trainers, which read no other setting."""
    folder = os.environ.get("DAR_FAULT_POINTS")
    return Path(folder) if folder else None


CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
"""Variables by which an HTTP client finds certificates, and writes keys of connections."""
PROXIES = tuple(
    name
    for upper in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    for name in (upper, upper.lower())
)
"""Variables by which an HTTP client finds its proxies. They may have a password."""


def unusable_surroundings(error: Exception) -> ConfigurationError:
    """The error for an HTTP client that could not be made from the variables of this process."""
    if isinstance(error, OSError):
        given = inherited_environment(CERTIFICATES)
        named = ", ".join(f"{name} ({value})" for name, value in given.items())
        why = f"the certificates cannot be loaded: {error.strerror or error}"
        return ConfigurationError(f"{why}; correct {named or 'those of this machine'}")
    named = ", ".join(inherited_environment(PROXIES)) or "the proxy of this machine"
    needs = "a SOCKS proxy needs the package socksio" if isinstance(error, ImportError) else None
    why = needs or "it must be a URL like http://proxy:3128"
    return ConfigurationError(f"the HTTP proxy cannot be used: {why}; correct {named}")


def forget_environment(name: str) -> None:
    """Unset a variable of this process that a library has set for itself."""
    os.environ.pop(name, None)
