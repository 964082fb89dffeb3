"""Restores a backup into an empty installation.

Everything is checked before the first byte is written. Files are copied beside their places and
moved there at the end, the database last, so that a restore that was interrupted can be repeated.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from dar.disk import OTHER_HOME_HINT, make_folder, sync, sync_tree
from dar.errors import ConfigurationError
from dar.settings import Settings
from service import keys, migrate
from service.backup import databases
from service.backup.manifest import ARTIFACTS, BackupManifest

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
    home, artifacts = settings.home, settings.artifacts_path
    is_repeated = (home / UNFINISHED).is_dir()
    _check_empty(home, "home", (ARTIFACTS, *SECRETS) if is_repeated else ())
    _check_empty(artifacts, "artifacts folder", STORED if is_repeated else ())
    databases.check_empty(settings, manifest.database)
    manifest.check(folder)
    make_folder(home, OTHER_HOME_HINT)
    home.chmod(0o700)
    # The mark in the home is the first to come and the last to go.
    with _beside(home) as new_home, _beside(artifacts) as new_artifacts:
        _copy(manifest, folder, new_home, new_artifacts)
        for name in STORED:
            shutil.rmtree(artifacts / name, ignore_errors=True)
        for path in sorted(new_artifacts.iterdir()):
            path.replace(artifacts / path.name)
        for name in SECRETS:
            if (new_home / name).exists():
                (new_home / name).replace(home / name)
        copied = new_home / databases.FILES[manifest.database]
        if manifest.database == "postgresql":
            databases.restore_postgresql(settings, copied)
        else:
            place = databases.sqlite_path(settings)
            make_folder(
                place.parent, "give a file in a folder that you may write to with DAR_DATABASE_URL"
            )
            shutil.move(copied, place)
            sync(place)
            sync(place.parent)
        sync(home)
        sync(artifacts)
    return manifest


def _copy(manifest: BackupManifest, folder: Path, home: Path, artifacts: Path) -> None:
    for file in manifest.files:
        first, _, rest = file.path.partition("/")
        target = artifacts / rest if first == ARTIFACTS and rest else home / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file.path, target)
        target.chmod(0o600)
    for place in (home, artifacts):
        sync_tree(place)


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
