"""Identifiers: ``<prefix><ULID>``, opaque to clients, sortable by time, without a slash."""

from typing import Literal

from ulid import ULID

Prefix = Literal[
    "ftjob-",
    "file-",
    "ckpt-",
    "lease-",
    "req-",
    "ftevent-",
    "rwq_",
    "rwe_",
    "rws_",
    "rwf_",
    "key-",
    "proj-",
    "inc-",
    "machine-",
    "upload_",
    "part_",
]


def new_id(prefix: Prefix) -> str:
    """A new id, like ``ftjob-01K…``."""
    return f"{prefix}{ULID()}"
