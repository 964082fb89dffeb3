"""Restores a backup into an empty installation.

Everything is checked before the first byte is written. Files are copied beside their places and
moved there at the end, or stored in the bucket. The database comes last, so that a restore that was
interrupted can be repeated.
"""

import functools
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from dar.disk import OTHER_HOME_HINT, make_folder, sync, sync_tree
from dar.errors import ConfigurationError
from dar.settings import Settings
from service import keys, migrate
from service.backup import databases
from service.backup.manifest import ARTIFACTS, BackedUpFile, BackupManifest
from service.storage.opening import open_storage
from service.storage.storage import CHUNK_BYTES, Storage

UNFINISHED = ".restore-unfinished"
"""Folder of a restore that is not finished."""
STORED = ("files", "checkpoints")
"""Folders of the artifacts."""
SECRETS = (
    keys.API_KEY_FILE,
    keys.WORKER_KEY_FILE,
    keys.REWARD_SECRET_FILE,
    keys.KEYS_OF_SECRETS_FILE,
)


def restore(settings: Settings, folder: Path) -> BackupManifest:
    """Restore the backup in ``folder``.

    Raises:
        ConfigurationError: The backup is damaged or newer than this code, or the home, the
            artifacts folder or the database is not empty.
        ServiceUnavailableError: The database does not answer.
    """
    manifest = BackupManifest.read(folder)
    if not migrate.knows(manifest.revision):
        raise ConfigurationError(
            f"the backup {folder} has the schema {manifest.revision}, which is newer than this code; "
            f"restore it with version {manifest.version} or a later one"
        )
    home, storage = settings.home, open_storage(settings)
    artifacts = settings.artifacts_path if storage.path("") is not None else None
    is_repeated = (home / UNFINISHED).is_dir()
    _check_empty(home, "home", (ARTIFACTS, *SECRETS) if is_repeated else ())
    if artifacts is not None:
        _check_empty(artifacts, "artifacts folder", STORED if is_repeated else ())
    elif not is_repeated and (found := next(storage.entries(""), None)) is not None:
        raise ConfigurationError(
            f"{storage.where} is not empty (it has {found.key}); a backup is restored into an empty "
            "place only. Give another with DAR_STORAGE_URL"
        )
    databases.check_empty(settings, manifest.database)
    manifest.check(folder)
    make_folder(home, OTHER_HOME_HINT)
    home.chmod(0o700)
    # The mark in the home is the first to come and the last to go.
    with _beside(home) as new_home:
        _copy(manifest, folder, new_home)
        if artifacts is None:
            _store(manifest, folder, storage)
        else:
            _place(manifest, folder, artifacts)
        for name in SECRETS:
            if (new_home / name).exists():
                (new_home / name).replace(home / name)
        copied = new_home / databases.FILES[manifest.database]
        if manifest.database == "postgresql":
            databases.restore_postgresql(settings, copied)
            databases.forget_storage(settings.sqlalchemy_url)
        else:
            databases.forget_storage(f"sqlite:///{copied}")
            place = databases.sqlite_path(settings)
            make_folder(
                place.parent, "give a file in a folder that you may write to with DAR_DATABASE_URL"
            )
            shutil.move(copied, place)
            sync(place)
            sync(place.parent)
        sync(home)
    storage.close()
    return manifest


def _copy(
    manifest: BackupManifest, folder: Path, place: Path, *, is_of_artifacts: bool = False
) -> None:
    """Copy the files of the artifacts, or all others, durably."""
    for file in manifest.files:
        key = _key_of(file)
        if (key is not None) == is_of_artifacts:
            target = place / (key or file.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file.path, target)
            target.chmod(0o600)
    sync_tree(place)


def _key_of(file: BackedUpFile) -> str | None:
    """Key of a file in the artifact store; None: it belongs into the home."""
    first, _, rest = file.path.partition("/")
    return rest if first == ARTIFACTS and rest else None


def _place(manifest: BackupManifest, folder: Path, artifacts: Path) -> None:
    """Fill a folder of artifacts."""
    with _beside(artifacts) as new_artifacts:
        _copy(manifest, folder, new_artifacts, is_of_artifacts=True)
        for name in STORED:
            shutil.rmtree(artifacts / name, ignore_errors=True)
        for path in sorted(new_artifacts.iterdir()):
            path.replace(artifacts / path.name)
        sync(artifacts)


def _store(manifest: BackupManifest, folder: Path, storage: Storage) -> None:
    """Fill a bucket. What an interrupted restore has stored is stored again."""
    storage.prepare()
    for file in manifest.files:
        if (key := _key_of(file)) is not None:
            with (folder / file.path).open("rb") as content:
                storage.put(key, iter(functools.partial(content.read, CHUNK_BYTES), b""))


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A new folder in ``place``, removed at the end with what is still in it."""
    folder = place / UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _check_empty(folder: Path, what: str, ours: Collection[str]) -> None:
    """Check that a folder is empty, but for ``ours``, which an interrupted restore has left.

    Raises:
        ConfigurationError: It is not.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigurationError(f"the {what} {folder} is not a folder; give another one")
    found = sorted({path.name for path in folder.iterdir()} - {UNFINISHED, *ours})
    if found:
        raise ConfigurationError(
            f"the {what} {folder} is not empty (it has {found[0]}); a backup is restored into an "
            "empty one only. Give another with --home or DAR_HOME, or move this one away"
        )
