"""Checkpoints: published completely or not at all, and loaded only if every byte is unchanged.

A checkpoint is a folder. It contains the model's files, as `from_pretrained` reads them, and a
folder ``resume/`` with what only a resume needs. ``MANIFEST.json`` is written last and holds size
and SHA-256 of every other file. Tensors are stored as safetensors and everything else as JSON,
never as a pickle, which could run code when it is loaded.

Publishing: write into ``.tmp-…``, fsync every file and folder, rename, fsync the parent. A process
that is killed meanwhile leaves only a ``.tmp-…``, which the next one removes.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dar.disk import file_sha256, sync, sync_tree
from dar.errors import CheckpointError
from dar.fault_points import fault_point
from dar.protocol.checkpoints import (
    MANIFEST_NAME,
    RESUME_FOLDER,
    Manifest,
    ManifestFile,
    checkpoint_folders,
)
from dar.training.checkpoint.disk_errors import explained
from dar.training.model.adapters import ADAPTER_WEIGHTS, LanguageModel, adapter_name

TENSORS_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
TEMPORARY_PREFIX = ".tmp-"


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint on disk."""

    folder: Path
    manifest: Manifest
    manifest_sha256: str


def digest(value: object) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def publish(
    root: Path,
    step: int,
    *,
    write: Callable[[Path], None],
    manifest: Callable[[list[ManifestFile]], Manifest],
) -> Published:
    """Write a checkpoint and publish it as ``root/step-<step>`` by one rename.

    Args:
        root: Folder of all checkpoints; it is created.
        step: Optimizer steps done.
        write: Writes the files into a folder.
        manifest: Makes the manifest of those files.

    Raises:
        OSError: The disk is full or broken; no checkpoint was published.
    """
    return complete(stage(root, step, write), step, manifest)


def _explained(root: Path, step: int) -> contextlib.AbstractContextManager[None]:
    return explained(f"the checkpoint of step {step}", root, root)


def stage(root: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write the files of a checkpoint, without making them durable; see `publish`.

    Returns:
        The folder with them, for `complete`.
    """
    with _explained(root, step):
        return _stage(root, step, write)


def _stage(root: Path, step: int, write: Callable[[Path], None]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f"{TEMPORARY_PREFIX}step-{step}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / RESUME_FOLDER).mkdir(parents=True)
    try:
        fault_point("checkpoint.begun")
        write(temporary)
        fault_point("checkpoint.written")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return temporary


def complete(
    temporary: Path, step: int, manifest: Callable[[list[ManifestFile]], Manifest]
) -> Published:
    """Describe staged files, make them durable and give the checkpoint its name; see `publish`."""
    with _explained(temporary.parent, step):
        return _complete(temporary, step, manifest)


def _complete(
    temporary: Path, step: int, manifest: Callable[[list[ManifestFile]], Manifest]
) -> Published:
    root = temporary.parent
    try:
        made = manifest(_describe(temporary))
        body = made.model_dump_json(indent=1).encode()
        (temporary / MANIFEST_NAME).write_bytes(body)
        fault_point("checkpoint.described")
        sync_tree(temporary)
        fault_point("checkpoint.synced")
        target = root / f"step-{step}"
        if target.exists():  # of an attempt that died after its rename
            shutil.rmtree(target)
        temporary.rename(target)
        fault_point("checkpoint.renamed")
        sync(root)
        fault_point("checkpoint.published")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Published(target, made, hashlib.sha256(body).hexdigest())


def copy_files(source: Path, target: Path, manifest: Manifest) -> None:
    """Copy the files of ``manifest`` into another checkpoint folder that has its sub-folders."""
    for file in manifest.files:
        shutil.copyfile(source / file.name, target / file.name)


def sweep(root: Path) -> None:
    """Remove what killed processes left half-written."""
    for leftover in root.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def verify_or_name_older(folder: Path) -> Manifest:
    """As `verify`, but the error names the checkpoint before a damaged one, if there is one.

    Raises:
        CheckpointError: See `verify`.
    """
    try:
        return verify(folder)
    except CheckpointError as error:
        series = checkpoint_folders(folder.parent)
        older = series[: series.index(folder)] if folder in series else []
        if not older:
            raise
        raise CheckpointError(
            f"{error.message}; resume from the one before, {older[-1]}, instead"
        ) from error


def verify(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and check every file against it.

    Raises:
        CheckpointError: It is no checkpoint, or a file is missing, changed or unknown; the message
            names it.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST_NAME}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{folder / MANIFEST_NAME} cannot be read: {where}{': ' if where else ''}{first['msg']}"
        ) from None
    listed = {file.name: file for file in manifest.files}
    present = {file.name: file for file in _describe(folder)}
    for name in sorted(listed.keys() | present.keys()):
        if name not in present:
            raise CheckpointError(f"{folder}: {name} is missing")
        if name not in listed:
            raise CheckpointError(f"{folder}: {name} does not belong to the checkpoint")
        if listed[name] != present[name]:
            raise CheckpointError(f"{folder}: {name} was altered after the checkpoint was written")
    return manifest


def _describe(folder: Path) -> list[ManifestFile]:
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or name == MANIFEST_NAME:
            continue
        files.append(ManifestFile(name=name, bytes=path.stat().st_size, sha256=file_sha256(path)))
    return files


# --- what only a resume needs ------------------------------------------------------------------


def save_resume_state(
    folder: Path, optimizer: Mapping[str, Any], scheduler: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Write optimizer, scheduler, random states and the trainer's own state into ``folder/resume``.

    Args:
        folder: The checkpoint.
        optimizer: ``state_dict`` of the optimizer: its state goes into safetensors, its
            hyperparameters into JSON.
        scheduler: ``state_dict`` of the learning-rate scheduler.
        own: The trainer's own state as JSON values.
    """
    tensors, optimizer_json = _split_optimizer(optimizer)
    rng_tensors, rng_json = _random_states()
    save_file(tensors | rng_tensors, folder / RESUME_FOLDER / TENSORS_NAME)
    state = {
        "optimizer": optimizer_json,
        "scheduler": dict(scheduler),
        "random": rng_json,
        "trainer": dict(own),
    }
    (folder / RESUME_FOLDER / STATE_NAME).write_text(json.dumps(state), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class ResumeState:
    """What `save_resume_state` wrote."""

    tensors: dict[str, Tensor]
    json: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "ResumeState":
        """Read it from the verified checkpoint in ``folder``."""
        resume = folder / RESUME_FOLDER
        return cls(
            load_file(resume / TENSORS_NAME),
            json.loads((resume / STATE_NAME).read_text(encoding="utf-8")),
        )

    @property
    def trainer(self) -> dict[str, Any]:
        """The trainer's own state."""
        own: dict[str, Any] = self.json["trainer"]
        return own

    def optimizer_state(self) -> dict[str, Any]:
        """``state_dict`` of the optimizer."""
        state: dict[int, dict[str, Any]] = {
            int(index): dict(values) for index, values in self.json["optimizer"]["state"].items()
        }
        for key, tensor in self.tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                index, name = rest.split("/", 1)
                state.setdefault(int(index), {})[name] = tensor
        return {"state": state, "param_groups": self.json["optimizer"]["param_groups"]}

    def restore_random(self) -> None:
        """Restore every random generator."""
        states = self.json["random"]
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        name, position, has_gauss, cached = states["numpy"]
        keys = self.tensors["random/numpy"].numpy()
        np.random.set_state((name, keys.astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(self.tensors["random/cpu"])
        for key, tensor in self.tensors.items():
            if key.startswith("random/cuda/") and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensor, int(key.rsplit("/", 1)[1]))


def load_weights(model: LanguageModel, folder: Path) -> None:
    """Load the weights of the checkpoint in ``folder`` into ``model``.

    Raises:
        CheckpointError: They belong to another model.
    """
    try:
        if isinstance(model, PeftModel):
            weights = load_file(folder / ADAPTER_WEIGHTS)
            set_peft_model_state_dict(model, weights, adapter_name=adapter_name(model))
            return
        saved = type(model).from_pretrained(folder, use_safetensors=True, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be loaded: {error}") from error


def _split_optimizer(whole: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for index, values in whole["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.detach().cpu().contiguous()
            else:
                rest.setdefault(str(index), {})[name] = value
    return tensors, {"state": rest, "param_groups": whole["param_groups"]}


def _random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "random/cpu": torch.get_rng_state(),
        "random/numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        for device, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random/cuda/{device}"] = state
    return tensors, {
        "python": random.getstate(),
        "numpy": [name, int(position), int(has_gauss), float(cached)],
    }
