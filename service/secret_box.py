"""Secrets at rest: encrypted, and bound to what they are for.

Fernet has no associated data, so each value is encrypted together with its owner, endpoint, origin and use, and each reading
checks them: whoever can write to the database gains nothing by moving a secret to another row, or by giving its endpoint another
address.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from dar.errors import ConfigurationError, SecretUnreadableError
from dar.rewards.http.egress import parse_url

VERSION = 1
FINGERPRINT_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class Binding:
    """What a secret is for; part of what is encrypted."""

    owner: str
    """Project."""
    endpoint_id: str
    origin: str
    """Scheme, host and port that it may be sent to."""
    use: str
    """``signing``, or ``header:`` and the header's name."""


class SecretBox:
    """Encrypts and decrypts.

    Args:
        keys: Fernet keys (32 bytes, url-safe base64), the newest first; it encrypts, all decrypt.

    Raises:
        ConfigurationError: There is none, or one is malformed.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ConfigurationError("DAR_SECRET_KEYS: at least one key is needed")
        try:
            self._fernet = MultiFernet([Fernet(key) for key in keys])
            primary = base64.urlsafe_b64decode(keys[0])
        except (ValueError, binascii.Error):
            raise ConfigurationError(
                "DAR_SECRET_KEYS (or the file secret_keys): a key is url-safe base64 of 32 bytes; make one with "
                "python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'"
            ) from None
        # Another key than the one that encrypts: a fingerprint is shown to users.
        self._fingerprint_key = hmac.digest(primary, b"fingerprint", "sha256")

    def seal(self, binding: Binding, value: str) -> str:
        """``value`` for the database."""
        content = {"v": VERSION, **asdict(binding), "value": value}
        return self._fernet.encrypt(json.dumps(content).encode()).decode()

    def open(self, binding: Binding, token: str) -> str:
        """The value in what `seal` made for the same ``binding``.

        Raises:
            SecretUnreadableError: No key fits, or it was sealed for something else.
        """
        try:
            content = json.loads(self._fernet.decrypt(token.encode()))
        except (InvalidToken, ValueError):
            raise SecretUnreadableError(
                f"a secret of reward endpoint {binding.endpoint_id} cannot be decrypted; its operator must give the key "
                "that it was stored under (DAR_SECRET_KEYS), or its owner sends the secret again"
            ) from None
        value = content.pop("value", None)
        if content != {"v": VERSION, **asdict(binding)} or not isinstance(value, str):
            raise SecretUnreadableError(
                f"a secret of reward endpoint {binding.endpoint_id} was stored for something else and is not used; send it again"
            )
        return value

    def renew(self, token: str) -> str:
        """The same secret under the newest key.

        Raises:
            SecretUnreadableError: No key fits.
        """
        try:
            return self._fernet.rotate(token.encode()).decode()
        except InvalidToken:
            raise SecretUnreadableError(
                "a stored secret cannot be decrypted with any of the keys; add the one it was stored under to DAR_SECRET_KEYS"
            ) from None

    def is_readable(self, token: str) -> bool:
        """Whether one of the keys fits."""
        try:
            self._fernet.decrypt(token.encode())
        except InvalidToken:
            return False
        return True

    def fingerprint(self, binding: Binding, value: str) -> str:
        """Tells a value from others at the same endpoint; keyed, so that nobody can guess short ones by it."""
        content = f"{binding.endpoint_id}\n{value}".encode()
        return hmac.digest(self._fingerprint_key, content, "sha256").hex()[:FINGERPRINT_CHARACTERS]


def new_key() -> str:
    """A fresh key."""
    return Fernet.generate_key().decode()


def split_keys(text: str) -> list[str]:
    """Keys separated by commas or lines."""
    return [key for key in text.replace(",", "\n").split() if key]


def key_digest(key: str) -> str:
    """What the database knows a key by."""
    return hashlib.sha256(key.encode()).hexdigest()


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL, in the spelling in which they are dialled.

    Raises:
        RewardMisconfiguredError: It is no usable URL.
    """
    return parse_url(url, None).origin
