"""Files and folders that a command line of ``dar train`` names, checked before anything is loaded.

A folder that holds a run is never overwritten unless the user says so.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dar.errors import InvalidRequestError
from dar.protocol.checkpoints import MANIFEST_NAME, checkpoint_folders
from dar.protocol.reward_spec import RewardURL
from dar.training.script.arguments import CommandLine

REWARD_URL: TypeAdapter[str] = TypeAdapter(RewardURL)
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors",
               "*.safetensors.index.json")  # fmt: skip
"""What a run leaves in ``output_dir``, besides the tokenizer, its card and its checkpoints."""
CHECKPOINTS = "checkpoints"
NEWEST = ("latest", "true", "True")
"""Values of ``resume_from_checkpoint`` that name the newest checkpoint of ``output_dir``; true is
what `transformers.Trainer` takes."""


def check_places(line: CommandLine) -> None:
    """Check all paths, the hub's names excepted.

    Raises:
        InvalidRequestError: A path does not exist, or the output cannot or must not be written.
    """
    script = line.script
    for param, value in vars(script).items():
        if any("\0" in one for one in _texts(value)):
            raise InvalidRequestError(f"--{param} has a NUL character; remove it", param=param)
    for param, name in (
        ("dataset_name", script.dataset_name),
        ("eval_dataset_name", script.eval_dataset_name),
    ):
        if name is not None and _is_path(name, DATA_SUFFIXES):
            raise InvalidRequestError(f"there is no file or folder {name}", param=param)
    _check_models(line)
    for url in script.reward_url:
        try:
            REWARD_URL.validate_python(url)
        except ValidationError as error:  # the URL is not shown, as it may hold a token
            raise InvalidRequestError(
                f"--reward_url: {error.errors()[0]['msg']}", param="reward_url"
            ) from None
    for name in script.reward_function:
        _check_function(name)
    _check_output(line)


def _models(line: CommandLine) -> list[tuple[str, str]]:
    """All models that are loaded, each with the flag that names it."""
    script = line.script
    found = [("model_name_or_path", script.model_name_or_path or "")]
    found += [("reward_model_name_or_path", one) for one in script.reward_model_name_or_path]
    found.append(("reward_model_path", str(line.config.get("reward_model_path") or "")))
    return [(param, name) for param, name in found if name]


def _check_models(line: CommandLine) -> None:
    for param, name in _models(line):
        if _is_path(name):
            raise InvalidRequestError(f"--{param}: there is no folder {name}", param=param)
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise InvalidRequestError(
                f"--{param}: {name}{_instead_of_model(Path(name))}", param=param
            )


def _check_function(name: str) -> None:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InvalidRequestError(
            f"--reward_function is {name!r}, but must be module:function",
            param="reward_function",
        )
    if "/" in module or module.endswith(".py"):
        path = Path(module)
        raise InvalidRequestError(
            f"--reward_function {name!r} names a file, but must be module:function; run it in "
            f"{path.parent.resolve()} and give {path.stem}:{attribute}",
            param="reward_function",
        )


def _texts(value: object) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _is_path(name: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a path was meant that does not exist; any other name may be one of the hub."""
    is_meant = name.startswith((".", "/", "~")) or (bool(suffixes) and name.endswith(suffixes))
    return is_meant and not Path(name).expanduser().exists()


def _instead_of_model(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            " holds an adapter without its base model; give the base model, or a folder into which "
            "the adapter was merged (peft's merge_and_unload)"
        )
    found = _checkpoints(folder)
    if found:
        return f" has no config.json; did you mean its checkpoint {found[-1]}?"
    return " has no config.json, so it holds no model"


# --- the output ----------------------------------------------------------------------------------


def _check_output(line: CommandLine) -> None:
    folder = Path(str(line.config["output_dir"]))
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = "a file" if place.exists() else "a link to a place that does not exist"
        raise _refused(f"--output_dir {folder}: {place} is {what}; give another folder")
    if not os.access(place, os.W_OK):
        raise _refused(f"--output_dir {folder}: {place} cannot be written; give another folder")
    resume = line.config.get("resume_from_checkpoint")
    if resume is not None:
        _check_resume(str(resume), folder)
    if line.is_dry_run or line.is_forecast:
        return
    if line.is_overwriting:
        _check_overwriting(line, folder)
    elif found := next(_of_earlier_run(folder), None):
        _refuse_used(folder, found, resume)


def _check_resume(resume: str, folder: Path) -> None:
    if resume in NEWEST:
        if not _checkpoints(folder):
            raise InvalidRequestError(
                f"there is no checkpoint in {folder / CHECKPOINTS}", param="resume_from_checkpoint"
            )
        return
    if not (Path(resume) / MANIFEST_NAME).is_file():
        newest = _checkpoints(Path(resume))
        raise InvalidRequestError(
            f"--resume_from_checkpoint: {resume} is no checkpoint, as it has no {MANIFEST_NAME}; "
            f"give {newest[-1] if newest else f'a folder like {folder}/{CHECKPOINTS}/step-100'}, "
            "or latest",
            param="resume_from_checkpoint",
        )


def _refuse_used(folder: Path, found: Path, resume: object) -> None:
    is_inside = resume is not None and folder.resolve() in Path(str(resume)).resolve().parents
    if is_inside or str(resume) in NEWEST:
        return
    newest = _checkpoints(folder)
    goes_on = f", --resume_from_checkpoint {newest[-1]} to continue it" if newest else ""
    raise _refused(
        f"--output_dir {folder} holds an earlier run ({found.relative_to(folder)}); give another "
        f"folder{goes_on}, or --overwrite_output_dir to replace it"
    )


def _check_overwriting(line: CommandLine, folder: Path) -> None:
    if line.config.get("resume_from_checkpoint") is not None:
        raise _refused(
            "--overwrite_output_dir removes the run that --resume_from_checkpoint would continue; "
            "give one of them"
        )
    for _, name in _models(line):
        holding = (Path(name).resolve(), *Path(name).resolve().parents)
        if Path(name).is_dir() and folder.resolve() in holding:
            raise _refused(
                f"--overwrite_output_dir would remove the model {name}; give another --output_dir"
            )


def remove_earlier_run(folder: Path) -> None:
    """Remove the model and the checkpoints of the run in ``folder``; other files stay."""
    for path in list(_of_earlier_run(folder)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _of_earlier_run(folder: Path) -> Iterator[Path]:
    yield from _checkpoints(folder)
    for pattern in MODEL_FILES:
        yield from sorted(folder.glob(pattern))


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints below an output folder, oldest first."""
    return checkpoint_folders(folder / CHECKPOINTS)


def _refused(text: str) -> InvalidRequestError:
    return InvalidRequestError(text, param="output_dir")
