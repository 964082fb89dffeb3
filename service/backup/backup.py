"""Takes a backup of an installation that may be running.

The database is copied as it is at one instant, then the files that the copy refers to. A checkpoint
that the installation removes in between is missing; then the database is copied again. So the copy
and the files fit together, and a job resumes from the same checkpoint as it would have.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from dar.disk import PRIVATE, file_sha256, make_folder, sync_tree
from dar.errors import ConfigurationError
from dar.settings import Settings
from dar.version import __version__
from service import keys, migrate
from service.backup import databases
from service.backup.manifest import ARTIFACTS, FORMAT, BackedUpFile, BackupManifest
from service.storage.opening import open_storage
from service.storage.storage import Storage

ROUNDS = 5
"""How often the database is copied at most; after that, missing files are damage."""
CANNOT_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES, errno.ENOSYS}
)
"""Errors of a hard link that a copy does not have."""


def take(
    settings: Settings, folder: Path, *, is_copying: bool, has_secret_keys: bool
) -> BackupManifest:
    """Fill ``folder`` with a backup.

    Args:
        settings: The installation.
        folder: Made if it does not exist; it must be empty.
        is_copying: Copy every file, also where a hard link is possible.
        has_secret_keys: Include the keys that decrypt stored secrets.

    Raises:
        ConfigurationError: The folder or the database cannot be used.
        ServiceUnavailableError: The database does not answer.
    """
    make_folder(folder, "give a folder that you may write to")
    if any(folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty; give a new folder for each backup")
    manifest = _fill(settings, folder, is_copying=is_copying, has_secret_keys=has_secret_keys)
    sync_tree(folder)
    manifest.write(folder)
    return manifest


def _fill(
    settings: Settings, folder: Path, *, is_copying: bool, has_secret_keys: bool
) -> BackupManifest:
    kind = databases.kind_of(settings)
    copied = folder / databases.FILES[kind]
    taken: dict[str, BackedUpFile] = {}
    damaged: Mapping[str, str] = {}
    storage = open_storage(settings)
    for _ in range(ROUNDS):
        created_at = datetime.now(UTC).isoformat(timespec="seconds")
        contents = databases.copy(settings, copied)
        damaged = _take_files(storage, folder, contents, taken, is_copying=is_copying)
        missing = {name for name, why in damaged.items() if why == "missing"}
        if missing <= contents.set_aside:  # damage that is known needs no newer copy
            break
    for name in taken.keys() - contents.artifacts.keys():
        (folder / ARTIFACTS / name).unlink(missing_ok=True)
    wanted = [taken[name] for name in sorted(taken.keys() & contents.artifacts.keys())]
    secrets = _write_keys(settings, folder, has_secret_keys=has_secret_keys)
    return BackupManifest(
        format=FORMAT,
        version=__version__,
        created_at=created_at,
        database=kind,
        revision=migrate.head(),
        jobs=contents.jobs,
        unfinished_jobs=contents.unfinished_jobs,
        damaged=[f"{name} is {why}" for name, why in sorted(damaged.items())],
        files=[_entry(folder, copied.name), *secrets, *wanted],
    )


def _take_files(
    storage: Storage,
    folder: Path,
    contents: databases.Contents,
    taken: dict[str, BackedUpFile],
    *,
    is_copying: bool,
) -> Mapping[str, str]:
    """Take and verify the files that are not there yet; returns what is wrong, by file."""
    wrong: dict[str, str] = {}
    for name, (size, sha256) in contents.artifacts.items():
        if name in taken:
            continue
        target = folder / ARTIFACTS / name
        try:
            _take(storage, name, target, is_copying=is_copying)
        except FileNotFoundError:
            wrong[name] = "missing"
            continue
        if target.stat().st_size != size or file_sha256(target) != sha256:
            target.unlink()
            wrong[name] = "altered"
            continue
        taken[name] = BackedUpFile(path=f"{ARTIFACTS}/{name}", bytes=size, sha256=sha256)
    return wrong


def _take(storage: Storage, key: str, target: Path, *, is_copying: bool) -> None:
    """Link a file, which nothing ever changes in its place, or copy it from elsewhere."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    source = storage.path(key)
    if source is None:
        content = storage.read(key)
        with target.open("wb") as file:
            file.writelines(content)
        return
    if not is_copying:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise
        else:
            return
    shutil.copyfile(source, target)


def _write_keys(settings: Settings, folder: Path, *, has_secret_keys: bool) -> list[BackedUpFile]:
    given = {
        keys.API_KEY_FILE: settings.api_key,
        keys.WORKER_KEY_FILE: settings.worker_key,
        keys.REWARD_SECRET_FILE: settings.reward_secret,
    }
    if has_secret_keys:
        given[keys.KEYS_OF_SECRETS_FILE] = settings.secret_keys
    written = []
    for name, value in given.items():
        content = settings.secret_from(value, name)
        if content is None:
            raise ConfigurationError(
                f"{settings.home} has no {name}, and DAR_{name.upper()} is not set; give the home of "
                "the installation with --home or DAR_HOME"
            )
        path = folder / name
        path.touch(mode=0o777 & ~PRIVATE & ~0o100)
        path.write_text(content + "\n", encoding="utf-8")
        written.append(_entry(folder, name))
    return written


def _entry(folder: Path, name: str) -> BackedUpFile:
    path = folder / name
    return BackedUpFile(path=name, bytes=path.stat().st_size, sha256=file_sha256(path))
