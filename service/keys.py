"""Keys and secrets of an installation, made at the first start in files of mode 0600.

The database holds SHA-256 digests of keys, never a key. A key has 32 random bytes, so a fast digest
is enough.
"""

import base64
import contextlib
import hashlib
import hmac
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

from ulid import ULID

from dar.errors import ConfigurationError
from dar.rewards.http import signing
from dar.setting_kinds import is_loopback
from dar.settings import Settings
from service import secret_box
from service.store import keys, project_secrets, reward_secrets
from service.store.database import Database

API_KEY_FILE, WORKER_KEY_FILE, REWARD_SECRET_FILE = "api_key", "worker_key", "reward_secret"
KEYS_OF_SECRETS_FILE = "secret_keys"
SHORTEST_KEY = 16
"""Characters of a key that an operator has chosen, where others than this machine reach it."""
USER_SCOPES = "read submit admin"
WORKER_SCOPES = "worker"
_KEY = re.compile(r"dar-[sw]k-([0-9A-Za-z]{8,40})-[\w-]{43}", re.ASCII)
_ATTEMPT_TOKEN = re.compile(r"dar-at-([0-9A-Z]{26})-[\w-]{43}", re.ASCII)


def new_api_key() -> str:
    return f"dar-sk-{ULID()}-{secrets.token_urlsafe(32)}"


def new_worker_key() -> str:
    return f"dar-wk-{ULID()}-{secrets.token_urlsafe(32)}"


def new_reward_secret() -> str:
    """A new secret in the format of Standard Webhooks."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


MAKERS = {
    API_KEY_FILE: new_api_key,
    WORKER_KEY_FILE: new_worker_key,
    REWARD_SECRET_FILE: new_reward_secret,
}


def new_attempt_token(lease_id: str) -> str:
    """A new token of an attempt. It contains the id of its lease, by which it is found."""
    return f"dar-at-{lease_id.removeprefix('lease-')}-{secrets.token_urlsafe(32)}"


def lease_of_token(token: str) -> str | None:
    """The lease that an attempt token names; None for any other text."""
    match = _ATTEMPT_TOKEN.fullmatch(token)
    return None if match is None else f"lease-{match[1]}"


def key_id(key: str) -> str:
    """Id under which a key is stored: part of the key, or a digest if an operator chose the key."""
    match = _KEY.fullmatch(key)
    return f"key-{match[1] if match else digest(key)[:26]}"


def digest(secret: str) -> str:
    """SHA-256 of a key or token, in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def is_equal(secret: str, sha256: str) -> bool:
    """Whether a secret has this digest, compared in constant time."""
    return hmac.compare_digest(digest(secret), sha256)


def configure(settings: Settings, database: Database) -> str:
    """Make the missing keys, and store the keys of the settings and the key files.

    A key in a setting replaces the previous one. A key in a file replaces it only with SQLite,
    where this host is the whole installation; with PostgreSQL another host may still use the
    previous one.

    Returns:
        The secrets that sign requests to inline reward URLs, separated.

    Raises:
        ConfigurationError: Other hosts have keys that this host does not have, or a chosen key can
            be guessed by others that reach this host.
    """
    _refuse_guessable(settings)
    settings.home.mkdir(parents=True, exist_ok=True)
    settings.home.chmod(0o700)
    with database.write() as transaction:
        keys.lock(transaction)
        given = _given(settings)
        missing = [name for name, value in given.items() if value is None]
        if missing and database.is_postgresql and keys.is_any_configured(transaction):
            raise ConfigurationError(
                f"this database is used with other keys, and {', '.join(missing)} are not in "
                f"{settings.home}; copy them from a host that has them, or set DAR_API_KEY, "
                "DAR_WORKER_KEY and DAR_REWARD_SECRET"
            )
        user, worker, reward = (
            value or _make(settings.home / name, MAKERS[name]) for name, value in given.items()
        )
        is_alone = not database.is_postgresql
        records = [
            _record(user, USER_SCOPES, is_only=is_alone or settings.api_key is not None),
            _record(worker, WORKER_SCOPES, is_only=is_alone or settings.worker_key is not None),
        ]
        keys.configure(transaction, records)
    return reward


def _refuse_guessable(settings: Settings) -> None:
    if is_loopback(settings.host):
        return
    for name, value in (("DAR_API_KEY", settings.api_key), ("DAR_WORKER_KEY", settings.worker_key)):
        if value is not None and len(value.get_secret_value()) < SHORTEST_KEY:
            raise ConfigurationError(
                f"{name} is too short for a service that others reach ({settings.host}): a key that "
                f"you choose needs {SHORTEST_KEY} characters; leave it unset and the first start "
                "makes one"
            )


def checked_reward_secrets(given: str) -> tuple[str, ...]:
    """The reward secrets of the settings, the newest first.

    Raises:
        ConfigurationError: No request can be signed with one of them. The message does not show it.
    """
    found = tuple(signing.secrets_in(given))
    try:
        for secret in found or [""]:
            signing.decode_secret(secret)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"DAR_REWARD_SECRET (or the file {REWARD_SECRET_FILE}): {error.message}"
        ) from None
    return found


def _record(key: str, scopes: str, *, is_only: bool) -> keys.KeyRecord:
    is_of_worker = scopes == WORKER_SCOPES
    return keys.KeyRecord(key_id(key), digest(key), scopes, is_of_worker, is_only)


def secret_keys(settings: Settings, database: Database) -> list[str]:
    """The keys that encrypt stored secrets, the newest first; made at the first start.

    Raises:
        ConfigurationError: Other hosts or stored secrets use keys that this host does not have.
    """
    given = settings.secret_from(settings.secret_keys, KEYS_OF_SECRETS_FILE)
    with database.write() as transaction:
        keys.lock(transaction)
        known = reward_secrets.known_keys(transaction)
        newest = (reward_secrets.any_token(transaction), project_secrets.token_in_use(transaction))
        tokens = [token for token in newest if token is not None]
        if given is None and known and (database.is_postgresql or tokens):
            raise ConfigurationError(
                f"this database holds secrets under a key that is not in {settings.home}; copy "
                f"{KEYS_OF_SECRETS_FILE} from another host, or set DAR_SECRET_KEYS"
            )
        path = settings.home / KEYS_OF_SECRETS_FILE
        found = (given or _make(path, secret_box.new_key)).replace(",", " ").split()
        digests = [digest(key) for key in found]
        is_foreign = database.is_postgresql and bool(known) and known.isdisjoint(digests)
        box = secret_box.SecretBox(found)
        if is_foreign or not all(map(box.is_readable, tokens)):
            raise ConfigurationError(
                "none of the keys in DAR_SECRET_KEYS (or the file secret_keys) decrypts what is "
                "stored in this database; add the one that its secrets were stored under"
            )
        reward_secrets.note_keys(transaction, digests)
        project_secrets.keep_root(transaction, box)
    return found


def _given(settings: Settings) -> dict[str, str | None]:
    return {
        API_KEY_FILE: settings.secret_from(settings.api_key, API_KEY_FILE),
        WORKER_KEY_FILE: settings.secret_from(settings.worker_key, WORKER_KEY_FILE),
        REWARD_SECRET_FILE: settings.secret_from(settings.reward_secret, REWARD_SECRET_FILE),
    }


def _make(path: Path, make: Callable[[], str]) -> str:
    """The content of ``path``, made by one process if missing and read by all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8") as file:  # mode 0600
        file.write(make() + "\n")
        file.flush()
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(file.name)
    return path.read_text(encoding="utf-8").strip()
