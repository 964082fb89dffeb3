"""Keys and secrets of an installation: made at the first start, kept in files that only their owner can read.

The database holds SHA-256 digests of keys, never a key. A key is 32 random bytes, so that a fast digest is enough.
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

from dar.settings import Settings
from service.store import keys
from service.store.database import Database

API_KEY_FILE, WORKER_KEY_FILE, REWARD_SECRET_FILE = "api_key", "worker_key", "reward_secret"
USER_SCOPES = "read submit admin"
WORKER_SCOPES = "worker"
_KEY = re.compile(r"^dar-[sw]k-([0-9A-Za-z]{8,40})-[\w-]{43}$", re.ASCII)
_ATTEMPT_TOKEN = re.compile(r"^dar-at-([0-9A-Z]{26})-[\w-]{43}$", re.ASCII)


def new_api_key() -> str:
    """A fresh key of a user."""
    return f"dar-sk-{ULID()}-{secrets.token_urlsafe(32)}"


def new_worker_key() -> str:
    """A fresh key of a worker."""
    return f"dar-wk-{ULID()}-{secrets.token_urlsafe(32)}"


def new_reward_secret() -> str:
    """A fresh Standard Webhooks secret."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def new_attempt_token(lease_id: str) -> str:
    """A fresh token of one attempt; it names its lease, which is where it is looked up."""
    return f"dar-at-{lease_id.removeprefix('lease-')}-{secrets.token_urlsafe(32)}"


def lease_of_token(token: str) -> str | None:
    """The lease that a token says it is for; None for what is no attempt token."""
    match = _ATTEMPT_TOKEN.match(token)
    return None if match is None else f"lease-{match[1]}"


def key_id(key: str) -> str:
    """What a key is looked up by: its second part, or a digest for one that an operator has made up."""
    match = _KEY.match(key)
    return f"key-{match[1] if match else digest(key)[:26]}"


def digest(secret: str) -> str:
    """SHA-256 of a key or token, in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def is_equal(secret: str, sha256: str) -> bool:
    """Whether a secret has this digest; takes the same time wherever they differ."""
    return hmac.compare_digest(digest(secret), sha256)


def configure(settings: Settings, database: Database) -> str:
    """Make what is missing, and make the keys of the settings the ones that open the door.

    Returns:
        The secret that signs requests to inline reward URLs.
    """
    home = settings.home
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    user = settings.secret_from(settings.api_key, API_KEY_FILE)
    worker = settings.secret_from(settings.worker_key, WORKER_KEY_FILE)
    reward = settings.secret_from(settings.reward_secret, REWARD_SECRET_FILE)
    user = user or _make(home / API_KEY_FILE, new_api_key)
    worker = worker or _make(home / WORKER_KEY_FILE, new_worker_key)
    reward = reward or _make(home / REWARD_SECRET_FILE, new_reward_secret)
    records = [
        keys.KeyRecord(key_id(user), digest(user), USER_SCOPES, is_of_worker=False),
        keys.KeyRecord(key_id(worker), digest(worker), WORKER_SCOPES, is_of_worker=True),
    ]
    with database.write() as transaction:
        keys.configure(transaction, records)
    return reward


def _make(path: Path, make: Callable[[], str]) -> str:
    """The content of ``path``, made if it is not there; of two processes at once, one makes it and both read it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8") as file:  # mode 0600
        file.write(make() + "\n")
        file.flush()
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(file.name)
    return path.read_text(encoding="utf-8").strip()
