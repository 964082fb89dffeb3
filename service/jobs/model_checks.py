"""What the files of an installed model rule out, read at submission and without torch.

Only what is certain is refused here: a file that is missing or, but for config.json, not understood
is left to the worker, which loads the model.
"""

import itertools
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from dar.errors import Problem
from dar.protocol.model_configs import (
    context_of,
    labels_of,
    refused_code,
    rope_change,
    steady_length,
)
from dar.protocol.spec import JobSpec
from dar.protocol.spec_checks import leaves_room
from dar.rewards.from_spec import PATH
from service.storage.storage import Storage

MAX_JSON_BYTES = 64 * 1024**2
"""Larger files are not read; a tokenizer_config.json of a large vocabulary has a few MiB."""
TARGETS = "method.dar.peft.target_modules"
PLAIN_ARCHITECTURES = frozenset(
    {
        *("bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4"),
        *("gpt2", "gpt_neo", "gpt_neox", "gptj", "granite", "llama", "mistral", "olmo", "olmo2"),
        *("opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
    }
)
"""Values of ``model_type`` whose files name modules as the loaded model does. transformers renames
or fuses modules of many others while it loads them."""
OTHER_HEADS = {"gpt_neox": "embed_out"}
"""Name of the head where it is not ``lm_head``, by ``model_type``. It is not in the files when it
shares the weights of the embeddings."""
BASES = ("", "model.", "transformer.", "gpt_neox.", "model.decoder.")
"""What precedes a module's path in the loaded model and may be left out in its files."""
MAX_PATTERN = 200
UNBOUNDED = re.compile(r"(?<!\\)[*+{]")
REPEATED_GROUP = re.compile(r"\)[*+?{]")
LEAST_LAYER_DIMS = 2
SHOWN_NAMES = 12


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model in a folder of this machine."""

    name: str
    """The model, as a job spec names it."""
    folder: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return self.read_object("config.json") or {}

    @property
    def config_problem(self) -> str | None:
        """Why no model can be loaded with this config.json; None if one may be."""
        if self._has("config.json") and self.read_object("config.json") is None:
            return (
                f"the config.json of the model {self.name!r} is not a JSON object, so the model "
                "cannot be loaded; install the model again"
            )
        return None

    def read_object(self, name: str) -> Mapping[str, Any] | None:
        """A JSON object in a file; None if there is none."""
        try:
            if self._size(name) > MAX_JSON_BYTES:
                return None
            content = json.loads(self._content(name, 0, MAX_JSON_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return content if isinstance(content, dict) else None

    def _has(self, *patterns: str) -> bool:
        return any(self.matching(pattern) for pattern in patterns)

    def matching(self, pattern: str) -> list[str]:
        """Names of the files that match a pattern, sorted."""
        found = self.folder.glob(pattern)
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the model, by name; folders in it are left out."""
        return {name: self._size(name) for name in self.matching("*") if self._is_file(name)}

    def _is_file(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def _size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def _content(self, name: str, first: int, end: int) -> bytes:
        with (self.folder / name).open("rb") as file:
            file.seek(first)
            return file.read(end - first)

    @property
    def lacks_chat_template(self) -> bool:
        """Whether there is a tokenizer, and certainly no chat template."""
        config = self.read_object("tokenizer_config.json")
        is_known = config is not None or self._has("tokenizer.json")
        own = ("chat_template*", "additional_chat_templates/*", "tekken.json")
        return is_known and not (config or {}).get("chat_template") and not self._has(*own)

    @property
    def is_pickled(self) -> bool:
        """Whether all weights are in pickles, which are never loaded."""
        is_safe = self._has("*.safetensors", "*.safetensors.index.json")
        return not is_safe and self._has("pytorch_model*.bin", "*.pt", "*.pth")

    def layers(self) -> frozenset[str] | None:
        """Paths of the modules with a matrix of weights; None if that is not known."""
        architecture = str(self.config.get("model_type"))
        if architecture not in PLAIN_ARCHITECTURES:
            return None
        headers = [self.header(name) for name in self.matching("*.safetensors")]
        if not headers or None in headers or "quantization_config" in self.config:
            return None
        entries = itertools.chain.from_iterable(header.items() for header in headers if header)
        return frozenset({OTHER_HEADS.get(architecture, "lm_head")}) | {
            name.removesuffix(".weight")
            for name, entry in entries
            if name.endswith(".weight") and len(entry.get("shape", ())) >= LEAST_LAYER_DIMS
        }

    @cached_property
    def _headers(self) -> dict[str, dict[str, Mapping[str, Any]] | None]:
        return {}

    def header(self, name: str) -> dict[str, Mapping[str, Any]] | None:
        """Names and shapes of the tensors in a safetensors file; None if it is damaged."""
        if name not in self._headers:
            self._headers[name] = self._read_header(name)
        return self._headers[name]

    def _read_header(self, name: str) -> dict[str, Mapping[str, Any]] | None:
        try:
            (size,) = struct.unpack("<Q", self._content(name, 0, 8))
            if size > MAX_JSON_BYTES:
                return None
            content = json.loads(self._content(name, 8, 8 + size))
        except (OSError, ValueError, struct.error, RecursionError):
            return None
        is_header = isinstance(content, dict) and all(isinstance(v, dict) for v in content.values())
        return content if is_header else None


@dataclass(frozen=True)
class StoredModelFiles(ModelFiles):
    """The files of a checkpoint in the artifact store; ``folder`` is its key."""

    storage: Storage

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        place = f"{self.folder.as_posix()}/"
        return {one.key.removeprefix(place): one.bytes for one in self.storage.entries(place)}

    def matching(self, pattern: str) -> list[str]:
        depth = pattern.count("/")
        names = (name for name in self._sizes if name.count("/") == depth)
        return sorted(name for name in names if fnmatchcase(name, pattern))

    def _is_file(self, name: str) -> bool:
        return name in self._sizes

    def _size(self, name: str) -> int:
        if name not in self._sizes:
            raise FileNotFoundError(name)
        return self._sizes[name]

    def _content(self, name: str, first: int, end: int) -> bytes:
        end = min(end, self._size(name))
        return b"".join(self.storage.read(f"{self.folder.as_posix()}/{name}", first, end))


def problems_of(
    spec: JobSpec, model: ModelFiles, chat_rows: Mapping[str, int | None]
) -> list[Problem]:
    """Why a job cannot start from a model.

    Args:
        spec: Spec of the job.
        model: The model.
        chat_rows: The first row with a conversation in each of the job's files; None: no such row.
    """
    if why := model.config_problem:
        return [Problem(why, "model", "model_config")]
    if why := refused_code(model.name, model.config):
        return [Problem(why, "model", "model_code")]
    if model.is_pickled:
        return [
            Problem(
                f"the weights of the model {model.name!r} are pickles, which are never loaded here; "
                "save it with safetensors",
                "model",
                "model_pickled",
            )
        ]
    return [*_of_context(spec, model), *_of_chats(model, chat_rows), *_of_targets(spec, model)]


def reward_model_problems(spec: JobSpec, models: Mapping[str, ModelFiles]) -> Iterator[Problem]:
    """Reward models that do not give one number per text.

    Args:
        spec: Spec of the job.
        models: Installed reward models by component name.
    """
    rewards = spec.dar.rewards
    for index, component in enumerate(() if rewards is None else rewards.components):
        model = models.get(component.name)
        if model is None:
            continue
        param = f"{PATH}.components[{index}].model"
        labels = labels_of(model.config)
        if why := model.config_problem:
            yield Problem(why, param, "model_config")
        elif why := refused_code(model.name, model.config):
            yield Problem(why, param, "model_code")
        elif labels not in {None, 1}:
            yield Problem(
                f"the reward model {model.name!r} gives {labels} numbers per text, but a reward is "
                "one; use a sequence classifier with one label",
                param,
                "reward_model_labels",
            )


def _of_context(spec: JobSpec, model: ModelFiles) -> Iterator[Problem]:
    """The same rule as that of the trainer for its longest prompt."""
    sampling, context = spec.dar.sampling, context_of(model.config)
    steady = steady_length(model.config)
    limits = [one for one in (sampling.max_length, context, steady) if one]
    if spec.dar.rewards is None or not (context or steady):
        return
    if not leaves_room(sampling, min(limits)):
        what = f"the context of the model {model.name!r}, which is {context} tokens"
        if steady == min(limits):
            what = f"{steady} tokens, and {rope_change(steady)}"
        yield Problem(
            f"a prompt and {sampling.max_new_tokens} new tokens do not fit into {what}; lower "
            "max_new_tokens",
            "method.dar.sampling.max_new_tokens",
            "context_exceeded",
        )


def _of_chats(model: ModelFiles, chat_rows: Mapping[str, int | None]) -> Iterator[Problem]:
    for param, row in chat_rows.items():
        if row is not None and model.lacks_chat_template:
            yield Problem(
                f"row {row} of the {param.replace('_', ' ')} is a conversation, but the tokenizer "
                f"of the model {model.name!r} has no chat template; send plain texts, or use an "
                "instruction-tuned model",
                param,
                "no_chat_template",
                row,
            )


def _of_targets(spec: JobSpec, model: ModelFiles) -> Iterator[Problem]:
    """Target modules that match no layer, by the rules of PEFT."""
    peft = spec.dar.peft
    if peft is None or peft.target_modules == "all-linear" or (layers := model.layers()) is None:
        return
    names = sorted({path.rpartition(".")[2] for path in layers})
    shown = ", ".join(names[:SHOWN_NAMES]) + (", …" if len(names) > SHOWN_NAMES else "")
    if isinstance(peft.target_modules, str):
        if _is_cheap(pattern := peft.target_modules) and not _matches(pattern, layers):
            yield Problem(
                f"the pattern {pattern!r} matches the path of no layer of the model "
                f"{model.name!r}, such as {max(layers, key=len)!r}; send a list to name layers, of "
                f"which there are: {shown}",
                TARGETS,
                "unknown_target",
            )
        return
    if missing := [name for name in peft.target_modules if not _is_there(name, layers)]:
        yield Problem(
            f"the model {model.name!r} has no layer {' and no layer '.join(map(repr, missing))}; "
            f"there are: {shown}",
            TARGETS,
            "unknown_target",
        )


def _is_there(target: str, layers: frozenset[str]) -> bool:
    paths = (f"{base}{path}" for base in BASES for path in layers)
    return any(path == target or path.endswith(f".{target}") for path in paths)


def _matches(pattern: str, layers: Sequence[str] | frozenset[str]) -> bool:
    compiled = re.compile(pattern)
    return any(compiled.fullmatch(f"{base}{path}") for base in BASES for path in layers)


def _is_cheap(pattern: str) -> bool:
    """Whether matching a pattern takes no more than quadratic time for a path."""
    if len(pattern) > MAX_PATTERN or REPEATED_GROUP.search(pattern):
        return False
    return len(UNBOUNDED.findall(pattern)) <= 2
