"""Kinds of settings: what a value must be, so that it fails at the start and not later.

A message says what to correct. It never shows a value that may hold a secret.
"""

import ipaddress
import platform
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

MAX_KEY = 256
"""Longest API key or worker key, in characters."""
MAX_NAME = 128
"""Longest name of a node or of a slot, in characters."""
MAX_FILE_NAME = 240
"""Longest name of a node or of a slot as a part of a file's name."""
PLAIN_HOST = "write it without a scheme, a port, brackets and a path"
LONGEST_SECONDS = 365 * 86400.0
"""Longest time that a setting may give. Waits of the system end before 300 years."""
BROKER_SCHEMES = ("redis://", "rediss://")
BROKER_OPTIONS = frozenset(
    f"ssl_{name}" for name in ("cert_reqs", "ca_certs", "certfile", "keyfile", "check_hostname")
)
"""Parts of a broker's query that both of its clients know."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
CERTIFICATE_CHECKS = frozenset({"none", "optional", "required"})


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


def _secret(secret: SecretStr | None) -> SecretStr | None:
    """``secret`` without spaces around it; None if nothing is left: it counts as not set."""
    plain = "" if secret is None else secret.get_secret_value().strip()
    return SecretStr(plain) if plain else None


def _key(key: SecretStr | None) -> SecretStr | None:
    plain = "" if key is None else plain_key(key.get_secret_value())
    return SecretStr(plain) if plain else None


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


def _given_folder(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError(
            "is empty, which would mean the current folder; give a folder, or unset it"
        )
    return value


def _folder(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{path.parts[0]} is the home of no user; give a whole path") from None


def _storage_url(value: object) -> object:
    """``s3://bucket/prefix``, or a folder as a path or as ``file://…``."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("is empty; give a folder or s3://bucket/prefix, or unset it")
    parts = urlsplit(value)
    if parts.scheme == "s3":
        if not _BUCKET.fullmatch(parts.netloc) or parts.query or parts.fragment:
            raise ValueError(
                "must be s3://bucket/prefix, with a bucket's name of 3 to 63 letters, digits, dots "
                "and hyphens, and without keys; give those in DAR_S3_ACCESS_KEY_ID and "
                "DAR_S3_SECRET_ACCESS_KEY"
            )
        return value.rstrip("/")
    if "://" in value and (parts.scheme != "file" or parts.netloc or not parts.path):
        raise ValueError("must be s3://bucket/prefix, or a folder like /srv/dar or file:///srv/dar")
    return str(_folder(Path(unquote(parts.path) if parts.scheme == "file" else value)))


def web_url(value: str) -> str:
    """The URL of a host, without a slash at its end.

    Raises:
        ValueError: It is none.
    """
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        raise ValueError("must be a URL like https://s3.example.com, without a user name")
    return value.rstrip("/")


def _cache_folder(value: object) -> object:
    """The XDG specification: an empty variable is the same as none."""
    return value or "~/.cache"


def _name(name: str) -> str:
    """Check the name of a node or a slot, which becomes a header and a part of a path."""
    if not all(" " <= ch <= "~" for ch in name) or name != name.strip() or not name:
        raise ValueError(
            f"must have 1 to {MAX_NAME} ASCII letters, digits and signs, and no space at an end"
        )
    if len(name) > MAX_NAME or len(quote(name, safe="")) > MAX_FILE_NAME:
        raise ValueError(
            f"is longer than {MAX_NAME} characters, or than {MAX_FILE_NAME} with its signs escaped"
        )
    return name


def _devices(devices: str | None) -> str | None:
    """Check a list of GPUs: CUDA takes an unknown one as the end of the list, without a word."""
    known = re.compile(r"\s*(?:-1|[0-9]{1,3}|(?:GPU|MIG)-[0-9A-Za-z/-]+)\s*", re.ASCII)
    if devices and not all(known.fullmatch(one) for one in devices.split(",")):
        raise ValueError(
            f"{devices!r:.80} is not a list of GPUs in the format of CUDA_VISIBLE_DEVICES; write "
            "numbers like 0,1, or ids like GPU-8932f937"
        )
    return devices


def own_node() -> str:
    """The name of this machine, with ``-`` for characters that the name of a node cannot have."""
    plain = "".join(ch if "!" <= ch <= "~" else "-" for ch in platform.node())
    return plain[:MAX_NAME] or "localhost"


def _host(host: str) -> str:
    """Check a host: a name that can exist, or an IP address without brackets."""
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)
        host.encode("idna")
        is_valid = bool(host) and re.search(r"[\s*\[\]/@?#]", host) is None
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"{host!r} is neither the name of a host nor an IP address; {PLAIN_HOST}")
    return host


def host_and_port(host: str, port: int) -> str:
    """``host:port`` as in a URL: an IPv6 address stands in brackets."""
    is_bare = ":" in host and not host.startswith("[")
    return f"[{host}]:{port}" if is_bare else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a service that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def reachable_url(host: str, port: int) -> str:
    """The URL under which this machine reaches a service that listens on ``host``."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://{host_and_port(local, port)}"


def _host_pattern(pattern: str) -> str:
    """Check a pattern of hosts, and give it the form that the hosts of URLs have."""
    if pattern == "*":
        return pattern
    start = "*." if pattern.startswith("*.") else ""
    host = _host(pattern.lower().removeprefix(start).removesuffix("."))
    return start + (host if ":" in host else host.encode("idna").decode())


def _network(cidr: str) -> str:
    ipaddress.ip_network(cidr)
    return cidr


def _broker(url: SecretStr) -> SecretStr:
    """Check all that the two clients of a broker read in its URL, each in its own way."""
    try:
        wrong = _wrong_in(urlsplit(url.get_secret_value()))
    except ValueError:
        wrong = "its host or its port is not valid"
    if wrong is not None or re.search(r"\s", url.get_secret_value()):
        raise ValueError(
            f"{wrong or 'it has a space in it'}; write it like redis://:password@host:6379/0, and "
            "escape signs of the password, like %23 for #, %2F for / and %3F for ?"
        )
    return url


def _wrong_in(parts: SplitResult) -> str | None:
    """What is wrong with the URL of a broker.

    Raises:
        ValueError: Its host or port.
    """
    (parts.hostname or "").encode("idna")
    options = parse_qs(parts.query, keep_blank_values=True)
    checks = options.get("ssl_cert_reqs", [])
    if parts.port == 0:
        return "its port is 0"
    if "#" in parts.geturl():
        return "it has a # in it"
    if re.fullmatch(r"/?|/[0-9]{1,9}", parts.path) is None:
        return "what follows its host is not the number of a database"
    if not BROKER_OPTIONS.issuperset(options) or not CERTIFICATE_CHECKS.issuperset(checks):
        return f"its query may only have {', '.join(sorted(BROKER_OPTIONS))}"
    return None


Key = Annotated[SecretStr | None, AfterValidator(_key)]
Secret = Annotated[SecretStr | None, AfterValidator(_secret)]
HubToken = Annotated[SecretStr | None, AfterValidator(_hub_token)]
Name = Annotated[str, AfterValidator(_name)]
Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]
Days = Annotated[float, Field(ge=0, le=36500, allow_inf_nan=False)]
Folder = Annotated[Path, BeforeValidator(_given_folder), AfterValidator(_folder)]
CacheFolder = Annotated[Path, BeforeValidator(_cache_folder), AfterValidator(_folder)]
StorageURL = Annotated[str, BeforeValidator(_storage_url)]
WebURL = Annotated[str, AfterValidator(web_url)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Host = Annotated[str, AfterValidator(_host)]
Devices = Annotated[str | None, AfterValidator(_devices)]
Hosts = Annotated[
    tuple[Annotated[str, AfterValidator(_host_pattern)], ...], NoDecode, BeforeValidator(_split)
]
Ports = Annotated[
    tuple[Annotated[int, Field(ge=1, le=65535)], ...], NoDecode, BeforeValidator(_split)
]
Networks = Annotated[
    tuple[Annotated[str, AfterValidator(_network)], ...], NoDecode, BeforeValidator(_split)
]
DatabaseURL = Annotated[
    SecretStr, _starting_with("sqlite:///", "postgresql://", "postgresql+psycopg://")
]
BrokerURL = Annotated[SecretStr, _starting_with(*BROKER_SCHEMES), AfterValidator(_broker)]
