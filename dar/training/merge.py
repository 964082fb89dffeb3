"""Merges a downloaded adapter into its base model, without any service: ``dar merge``."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dar.errors import InvalidRequestError, ServiceUnavailableError, TrainingError
from dar.training.model.adapters import ADAPTER_CONFIG
from dar.training.model.loading import (
    load_model,
    load_tokenizer,
    merge_adapters,
    read_adapter_config,
)
from dar.training.model.probes import check_finite, is_finite

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def merge(folder: Path, output: Path, base: str | None = None) -> None:
    """Write the adapter in ``folder``, merged into its base model, as a whole model.

    The sum is made in float32 and saved in the number format of the base model's files.

    Args:
        folder: A downloaded adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.
        output: Folder that is created.
        base: Folder or hub id of the base model; default: the one that the adapter names, if it is
            a folder or a hub id with its owner.

    Raises:
        InvalidRequestError: ``folder`` is no adapter, its base is unknown, or ``output`` exists or
            cannot be made.
        TrainingError: The base cannot be loaded, the adapter is damaged or does not fit it, or a
            weight of the sum is not finite.
        ServiceUnavailableError: The hub cannot be reached.
    """
    folder, output = _expanded(folder, "folder"), _expanded(output, "output")
    if base is not None and base.startswith("~"):
        base = str(_expanded(Path(base), "base"))
    if not (folder / ADAPTER_CONFIG).is_file():
        is_whole = (folder / "config.json").is_file()
        raise InvalidRequestError(
            f"{folder} has no {ADAPTER_CONFIG}; "
            + (
                "it is a whole model, so there is nothing to merge"
                if is_whole
                else "give the folder of a downloaded adapter"
            ),
            param="folder",
        )
    if output.exists():
        raise InvalidRequestError(
            f"{output} exists already; give a folder that does not", param="output"
        )
    named = read_adapter_config(folder).base_model_name_or_path
    source = base or _usable_base(folder, named)
    unfinished = output.with_name(f".{output.name}.unfinished")
    with _naming_output(output):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    try:
        _write_merged(folder, unfinished, source)
        with _naming_output(output):
            unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _naming_output(output: Path) -> Iterator[None]:
    """Say of an error of the file system which folder cannot be made."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidRequestError(
            f"{output} cannot be made: {why}; give another folder", param="output"
        ) from error


def _expanded(path: Path, param: str) -> Path:
    """``path`` with the home folder in place of its ``~``, as a shell leaves ``--base=~/m``.

    Raises:
        InvalidRequestError: It is the home of no user.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InvalidRequestError(
            f"{path} is in the home of no user; give the whole path", param=param
        ) from error


def _write_merged(folder: Path, output: Path, source: str) -> None:
    try:
        model = load_model(source, dtype="auto")
    except OSError as error:
        raise ServiceUnavailableError(
            f"the hub cannot be reached to load the base model {source!r}: {error}; give a folder "
            "with --base, or try again with a connection",
            code="hub_unreachable",
        ) from error
    saved_as = model.dtype
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else source)
    merged: Any = merge_adapters(model.float(), [folder])
    what = f"the sum of the adapter {folder} and its base model"
    check_finite(merged, what, param="folder")
    merged.to(saved_as)
    if not is_finite(merged):
        raise TrainingError(
            f"{what} has weights that {saved_as} cannot hold, the number format of the base "
            "model's files; give the base model in bfloat16 or float32 with --base",
            param="base",
        )
    merged.save_pretrained(output)
    tokenizer.save_pretrained(str(output))


def _usable_base(folder: Path, name: str | None) -> str:
    """The base model that the adapter names.

    A name without an owner is never looked up on the hub: a service's own model may have it, and a
    stranger's model on the hub too.
    """
    if name and (Path(name).is_dir() or HUB_ID.fullmatch(name)):
        return str(name)
    named = f"names the base model {name!r}, which is no folder here" if name else "names no base"
    raise InvalidRequestError(
        f"the adapter in {folder} {named}; give the folder or hub id of the model that training "
        "started from with --base",
        param="base",
    )
