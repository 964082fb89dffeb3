"""The list of all files of a backup, written last: a backup without it was not finished."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from dar.disk import file_sha256, read_if_there, write_atomically
from dar.errors import ConfigurationError

NAME = "backup.json"
FORMAT = 1
ARTIFACTS = "artifacts"


class BackedUpFile(BaseModel):
    """A file of a backup."""

    model_config = ConfigDict(frozen=True)

    path: str
    """In the backup's folder, with slashes."""
    bytes: int
    sha256: str


class BackupManifest(BaseModel):
    """What a backup contains."""

    model_config = ConfigDict(frozen=True)

    format: int
    """`FORMAT` of the version that made it; a higher one cannot be read."""
    version: str
    """Version of the software that made it."""
    created_at: str
    """When the copy of the database was made, in UTC."""
    database: str
    """``sqlite`` or ``postgresql``."""
    revision: str
    """Revision of the database's schema."""
    jobs: int
    unfinished_jobs: Sequence[str]
    """Ids of jobs that had not ended; they go on after a restore."""
    damaged: Sequence[str]
    """Files that the installation itself lacked or had altered; they are not in the backup."""
    files: Sequence[BackedUpFile]

    def write(self, folder: Path) -> None:
        """Write it, durably."""
        content = self.model_dump_json(indent=1).encode()
        write_atomically(folder / NAME, content, is_durable=True)

    @classmethod
    def read(cls, folder: Path) -> "BackupManifest":
        """The manifest of a backup.

        Raises:
            ConfigurationError: ``folder`` is not a finished backup, or one of a newer version.
        """
        content = read_if_there(folder / NAME) if folder.is_dir() else None
        if content is None:
            raise ConfigurationError(
                f"{folder} is not a finished backup: it has no {NAME}; name a folder that "
                "'dar backup' has filled"
            )
        try:
            made = cls.model_validate_json(content)
        except ValidationError:
            raise ConfigurationError(
                f"the backup {folder} is damaged: {NAME} cannot be read; use another backup"
            ) from None
        if made.format > FORMAT:
            raise ConfigurationError(
                f"the backup {folder} was made by the newer version {made.version}; restore it with "
                "that version"
            )
        return made

    def check(self, folder: Path) -> None:
        """Compare every file with its size and digest.

        Raises:
            ConfigurationError: One is missing or altered, or its name leads out of the folder.
        """
        for file in self.files:
            where = PurePosixPath(file.path)
            if where.is_absolute() or ".." in where.parts:
                raise _damaged(folder, file.path, "its name leads out of the folder")
            path = folder / where
            if not path.is_file():
                raise _damaged(folder, file.path, "it is missing")
            if (size := path.stat().st_size) != file.bytes:
                raise _damaged(folder, file.path, f"it has {size:,} of {file.bytes:,} bytes")
            if file_sha256(path) != file.sha256:
                raise _damaged(folder, file.path, "its content was altered")


def _damaged(folder: Path, name: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"the backup {folder} is damaged at {name}: {why}; use another backup. Nothing was restored"
    )
