"""Secrets at rest: encrypted, and bound to their use.

Fernet has no associated data, so each value is encrypted together with its owner, endpoint, origin
and use, which are checked at each reading. Write access to the database does not allow moving a
secret to another row, or changing the address of its endpoint.
"""

import base64
import binascii
import hmac
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dar.errors import ConfigurationError, SecretUnreadableError
from dar.rewards.http import egress

VERSION = 1
DERIVED_BYTES = 32
FINGERPRINT_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a secret may be used; encrypted with its value."""

    owner: str
    """Id of the project."""
    endpoint_id: str
    """Id of the endpoint; for a ``poll_url``, of the request."""
    origin: str
    """Scheme, host and port that the secret may be sent to; empty for a ``poll_url``, which the
    trainer checks against the URL of the request."""
    use: str
    """``signing``, ``header:`` and the header's name, or ``poll_url``."""


class SecretBox:
    """Encrypts and decrypts secrets.

    Args:
        keys: Fernet keys (32 bytes, url-safe base64); the first encrypts, all decrypt.

    Raises:
        ConfigurationError: There is no key, or one is malformed.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ConfigurationError("DAR_SECRET_KEYS: at least one key is needed")
        try:
            self._fernet = MultiFernet([Fernet(key) for key in keys])
            primary = base64.urlsafe_b64decode(keys[0])
        except (ValueError, binascii.Error):
            raise ConfigurationError(
                "DAR_SECRET_KEYS (or the file secret_keys): a key is url-safe base64 of 32 bytes; "
                "make one with python -c 'from cryptography.fernet import Fernet; "
                "print(Fernet.generate_key().decode())'"
            ) from None
        # Not the encryption key itself, as fingerprints are shown to users.
        self._fingerprint_key = hmac.digest(primary, b"fingerprint", "sha256")

    def seal(self, binding: Binding, value: str) -> str:
        """``value``, encrypted for the database."""
        content = {"v": VERSION, **asdict(binding), "value": value}
        return self._fernet.encrypt(json.dumps(content).encode()).decode()

    def open(self, binding: Binding, token: str) -> str:
        """Decrypt what `seal` returned for the same ``binding``.

        Raises:
            SecretUnreadableError: No key fits, or the binding differs.
        """
        try:
            content = json.loads(self._fernet.decrypt(token.encode()))
        except (InvalidToken, ValueError):
            raise SecretUnreadableError(
                f"a secret of reward endpoint {binding.endpoint_id} cannot be decrypted; "
                "the operator must add the key that it was stored with (DAR_SECRET_KEYS), or its "
                "owner must send the secret again"
            ) from None
        value = content.pop("value", None)
        if content != {"v": VERSION, **asdict(binding)} or not isinstance(value, str):
            raise SecretUnreadableError(
                f"a secret of reward endpoint {binding.endpoint_id} was stored for another use "
                "and is rejected; send it again"
            )
        return value

    def renew(self, token: str) -> str:
        """Encrypt the same secret with the newest key.

        Raises:
            SecretUnreadableError: No key fits.
        """
        try:
            return self._fernet.rotate(token.encode()).decode()
        except InvalidToken:
            raise SecretUnreadableError(
                "none of the keys decrypts a stored secret; add the key that it was stored with "
                "to DAR_SECRET_KEYS"
            ) from None

    def is_readable(self, token: str) -> bool:
        """Whether one of the keys fits."""
        try:
            self._fernet.decrypt(token.encode())
        except InvalidToken:
            return False
        return True

    def fingerprint(self, binding: Binding, value: str) -> str:
        """Identifies a value at one endpoint; keyed, so that short values cannot be guessed."""
        content = f"{binding.endpoint_id}\n{value}".encode()
        return hmac.digest(self._fingerprint_key, content, "sha256").hex()[:FINGERPRINT_CHARACTERS]


def derived(root: bytes, use: str) -> bytes:
    """A secret for ``use`` (HKDF-SHA256). Neither ``root`` nor other uses follow from it."""
    return HKDF(SHA256(), DERIVED_BYTES, salt=None, info=f"dar v1\n{use}".encode()).derive(root)


def new_key() -> str:
    """Make a random key."""
    return Fernet.generate_key().decode()


def origin_of(url: str) -> str:
    """Normalized scheme, host and port of a URL.

    Raises:
        RewardMisconfiguredError: The URL cannot be used.
    """
    return egress.origin_of(url)
