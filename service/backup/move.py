"""Copies all files of an installation into another storage: from a folder to a bucket, or back.

A file gets its place in the target only after all of its bytes were compared with the digest in the
database, and then it is read there again. So a move that was interrupted is repeated, and continues
where it was. The source keeps its files.
"""

import errno
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from dar.errors import ConfigurationError, ServiceUnavailableError
from dar.settings import Settings
from service.backup import databases
from service.storage.opening import open_storage
from service.storage.storage import MARKER, UNFINISHED, Storage
from service.storage_owner import MOVING

ROUNDS = 5
"""How often the database is read at most, for files that were stored during the move."""
REPORT_SECONDS = 5.0
OF_ONE_FILE = frozenset({errno.EIO, errno.EACCES, errno.EISDIR})
"""Errors that say something about one file, not about its storage."""


@dataclass(slots=True)
class Moved:
    """What a move has done."""

    source: str
    target: str
    files: int = 0
    """Files that the target has now, each with the digest in the database."""
    bytes: int = 0
    copied: int = 0
    """Those that it did not have before."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with files of the source that were not copied, by file."""
    set_aside: frozenset[str] = frozenset()
    """Those that the database names as damaged already."""


class _AlteredError(Exception):
    """A file of the source is not the one that the database names."""


def move(settings: Settings, target: Storage, *, is_quick: bool) -> Moved:
    """Copy every file that the database names, and verify it in its new place.

    Args:
        settings: The installation, with its present storage.
        target: The new storage.
        is_quick: Do not read files again that the target had before.

    Raises:
        ConfigurationError: The target cannot be used, or has files of another installation.
        ServiceUnavailableError: A storage or the database does not answer.
    """
    source = open_storage(settings)
    _check_apart(source, target)
    source.check_mounted()
    return _Move(settings, source, target, is_quick=is_quick).run()


def _check_apart(source: Storage, target: Storage) -> None:
    places = [_place(source), _place(target)]
    if places[0] == places[1]:
        raise ConfigurationError(f"the files are in {source.where} already; name another place")
    if any(one.startswith(other) for one, other in (places, places[::-1])):
        raise ConfigurationError(
            f"{target.where} and {source.where}, where the files are now, are inside each other; "
            "name a place apart from it"
        )


def _place(storage: Storage) -> str:
    folder = storage.path("")
    return f"{storage.where if folder is None else folder.resolve()}/"


class _MissingError(Exception):
    """The source has not such a file."""


class _UnreadableError(Exception):
    """The disk of the source cannot read a file."""


class _Move:
    def __init__(
        self, settings: Settings, source: Storage, target: Storage, *, is_quick: bool
    ) -> None:
        self._settings, self._source, self._target = settings, source, target
        self._is_quick = is_quick
        self._held = {
            entry.key: entry.bytes
            for entry in target.entries("")
            if not entry.key.startswith(UNFINISHED)
        }
        self._done: dict[str, int] = {}
        self._moved = Moved(source.where, target.where)
        self._reported_at = time.monotonic()

    def run(self) -> Moved:
        for number in range(ROUNDS):
            contents = databases.contents(self._settings)
            if number == 0:
                if mark := self._source.mark():  # none before the first start after a restore
                    self._source.owner = contents.storage_id or mark
                    self._source.check_mounted()
                self._take_target(contents)
            before = self._moved.copied
            self._moved.damaged = self._bring(contents.artifacts)
            self._moved.set_aside = contents.set_aside
            if self._moved.copied == before:
                break
        if contents.storage_id is not None:
            self._target.write_mark(contents.storage_id, contents.storage_id + MOVING)
        kept = self._done.keys() & contents.artifacts.keys()
        self._moved.files = len(kept)
        self._moved.bytes = sum(self._done[key] for key in kept)
        return self._moved

    def _take_target(self, contents: databases.Contents) -> None:
        """Prepare the target, once it is known to be no other installation's."""
        files, mark, own = contents.artifacts, self._target.mark(), contents.storage_id
        if mark and (own is None or mark not in {own, own + MOVING}):
            raise ConfigurationError(
                f"{self._target.where} belongs to another installation, as its {MARKER} says "
                f"{mark!r}; name an empty place"
            )
        if self._held and not self._held.keys() & files.keys():
            raise ConfigurationError(
                f"{self._target.where} has {len(self._held):,} files, none of them of this "
                f"installation, like {min(self._held)}; name an empty place"
            )
        self._target.prepare()
        if not mark and own is not None:
            self._target.write_mark(own + MOVING)

    def _bring(self, files: Mapping[str, tuple[int, str]]) -> Mapping[str, str]:
        """Copy what is not in the target; returns what is wrong in the source, by file."""
        damaged = {}
        for key, (size, sha256) in sorted(files.items()):
            if key in self._done:
                continue
            self._report(len(files))
            if not self._is_there(key, size, sha256):
                try:
                    self._copy(key, size, sha256)
                except _MissingError:
                    damaged[key] = "missing"
                    continue
                except _AlteredError:
                    damaged[key] = "altered"
                    continue
                except _UnreadableError as error:
                    damaged[key] = f"unreadable ({error})"
                    continue
                self._moved.copied += 1
            self._done[key] = size
        return damaged

    def _is_there(self, key: str, size: int, sha256: str) -> bool:
        if self._held.get(key) != size:
            return False
        try:
            return self._is_quick or _digest(self._target.read(key)) == sha256
        except OSError as error:
            raise _failed(self._target, f"give {key}", error) from error

    def _copy(self, key: str, size: int, sha256: str) -> None:
        try:
            self._target.put(key, _verified(self._read(key), size, sha256))
            is_same = _digest(self._target.read(key)) == sha256
        except OSError as error:
            raise _failed(self._target, f"take {key}", error) from error
        if not is_same:
            self._target.remove(key)
            raise ServiceUnavailableError(
                f"{self._target.where} gives other bytes of {key} than it was sent; find the cause, "
                "then run the command again, which goes on where it was",
                code="storage_unavailable",
            )

    def _read(self, key: str) -> Iterator[bytes]:
        """A file of the source."""
        try:
            yield from self._source.read(key)
        except FileNotFoundError as error:
            raise _MissingError from error
        except OSError as error:
            if error.errno in OF_ONE_FILE:
                raise _UnreadableError(error.strerror) from error
            raise _failed(self._source, f"give {key}", error) from error

    def _report(self, count: int) -> None:
        if time.monotonic() - self._reported_at >= REPORT_SECONDS:
            self._reported_at = time.monotonic()
            done = sum(self._done.values())
            sys.stderr.write(f"dar: {len(self._done):,} of {count:,} files, {done:,} bytes\n")


def _failed(storage: Storage, what: str, error: OSError) -> ServiceUnavailableError:
    return ServiceUnavailableError(
        f"{storage.where} cannot {what}: {error.strerror or error}; mend that, then run the command "
        "again, which goes on where it was",
        code="storage_unavailable",
    )


def _verified(content: Iterable[bytes], size: int, sha256: str) -> Iterator[bytes]:
    """The content. Its end raises if it is not what was expected, so that nothing is stored."""
    digest, length = hashlib.sha256(), 0
    for chunk in content:
        digest.update(chunk)
        length += len(chunk)
        yield chunk
    if length != size or digest.hexdigest() != sha256:
        raise _AlteredError


def _digest(content: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in content:
        digest.update(chunk)
    return digest.hexdigest()
