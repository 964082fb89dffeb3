"""Merges a downloaded adapter into its base model, without any service: ``dar merge``."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from dar.errors import InvalidRequestError, ServiceUnavailableError
from dar.training.model.loading import load_model, load_tokenizer, merge_adapters

ADAPTER_CONFIG = "adapter_config.json"
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
        InvalidRequestError: ``folder`` is no adapter, its base is unknown, or ``output`` exists.
        TrainingError: The base cannot be loaded, or the adapter does not fit it.
        ServiceUnavailableError: The hub cannot be reached.
    """
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
    source = base or _named_base(folder)
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
    merged.to(saved_as)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        merged.save_pretrained(unfinished)
        tokenizer.save_pretrained(str(unfinished))
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _named_base(folder: Path) -> str:
    """The base model that the adapter names.

    A name without an owner is never looked up on the hub: a service's own model may have it, and a
    stranger's model on the hub too.
    """
    name = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if name and (Path(name).is_dir() or HUB_ID.fullmatch(name)):
        return str(name)
    named = f"names the base model {name!r}, which is no folder here" if name else "names no base"
    raise InvalidRequestError(
        f"the adapter in {folder} {named}; give the folder or hub id of the model that training "
        "started from with --base",
        param="base",
    )
