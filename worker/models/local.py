"""The worker's own folder of models, and paths that stay inside a folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from dar.disk import link_out_of
from dar.errors import DARError

CONFIG = "config.json"
"""A folder is a model's if it has this file."""


class InputFetchError(DARError):
    """An input cannot be downloaded: it is altered, wrongly named, or the disk is full."""

    code = "input_failed"


def safe_path(folder: Path, name: str) -> Path:
    """``folder / name``, for a name that stays inside the folder.

    Raises:
        InputFetchError: It leaves the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or any(part in {"..", "."} for part in parts):
        raise InputFetchError(
            f"an input was named {name!r} by its source, which is not a path in a folder"
        )
    return folder.joinpath(*parts)


def arriving(target: Path) -> Path:
    """Where the bytes of a file are until all of them have arrived."""
    return target.with_name(f".tmp-{target.name}")


def size_of(path: Path) -> int | None:
    """Size of a file; None: there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def bytes_to_arrive(folder: Path, sizes: Mapping[str, int]) -> int:
    """How many bytes a folder lacks of files with these sizes.

    Raises:
        InputFetchError: A name leaves the folder.
    """
    found = 0
    for name, size in sizes.items():
        target = safe_path(folder, name)
        if size_of(target) != size:
            found += max(0, size - (size_of(arriving(target)) or 0))
    return found


def local_folder(models_path: Path, name: str) -> Path | None:
    """The folder of a model under the worker's models directory; None: there is none.

    Raises:
        InputFetchError: A file in it is a link to a place outside.
    """
    folder = safe_path(models_path, name)
    if not folder.is_dir():
        return None
    if (link := link_out_of(folder)) is not None:
        raise InputFetchError(
            f"model {name!r} cannot be used: {link} in {folder} is a symbolic link to a place "
            "outside of it; replace the link by the file",
            code="installation_broken",
        )
    return folder


def names_in(models_path: Path) -> Iterator[str]:
    """Names of the models under the worker's models directory."""
    if models_path.is_dir():
        for path in sorted(models_path.iterdir()):
            if not path.name.startswith(".") and (path / CONFIG).is_file():
                yield path.name
