"""The least memory that a trainer needs, by arithmetic from the files of its model, without torch.

It is a lower bound, so that no worker is left out that could run the job: weights, and for full
weights also gradients, the optimizer's state and the frozen reference. What depends on batches, on
the length of texts or on the attention is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dar.protocol.spec import DARSpec
from service.jobs.model_checks import ModelFiles

FLOAT, HALF = 4, 2
"""Bytes of a number. Weights that are trained are always of 4 bytes."""
ADAM = 2
"""Numbers that Adam keeps for each weight; Adafactor keeps far fewer."""
MOST_BYTES = 2**62
"""A model that needs more is damaged: what it needs is not known."""
MOST_DIMS = 64
"""torch has no tensor of more dimensions."""
INDEX = "model.safetensors.index.json"
GATED = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "llama", "mistral", "olmo"),
        *("olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
    }
)
"""Values of ``model_type`` with three matrices in each feed-forward block."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a machine's own memory that a trainer needs at least."""

    on_cpu: int
    """On a worker without GPUs."""
    beside_gpus: int
    """On a worker with GPUs: the weights, before they are moved to a GPU."""


def least_memory(spec: DARSpec, model: ModelFiles) -> Memory | None:
    """The least memory of a job that starts from a model; None: not known.

    Args:
        spec: Of the job.
        model: Its files.
    """
    count = parameters_of(model)
    if count is None:
        return None
    found = _for(spec, count)
    return found if 0 <= found.on_cpu <= MOST_BYTES and found.beside_gpus <= MOST_BYTES else None


def _for(spec: DARSpec, count: int) -> Memory:
    """The least memory of a job that trains a model of so many weights."""
    if spec.peft is not None:
        frozen = {"fp32": FLOAT, "auto": FLOAT}.get(spec.precision, HALF)
        return Memory(count * frozen, count * (FLOAT if spec.precision == "fp32" else HALF))
    numbers = 2 + (ADAM if spec.hyperparameters.optim != "adafactor" else 0)
    options = spec.hyperparameters
    numbers += options.alpha > 0 or options.kl_budget is not None  # the reference
    resources = spec.resources
    copies = resources.processes if resources.strategy in {"auto", "ddp"} else 1
    return Memory(count * FLOAT * numbers * copies, count * FLOAT)


def parameters_of(model: ModelFiles) -> int | None:
    """Number of weights of a model; None: not known.

    The tensors in its files count. Where only its config.json is here, the matrices count that a
    model of its kind has.
    """
    if "quantization_config" in model.config:
        return None
    names = _weight_files(model)
    if not names:
        return _by_config(model.config)
    headers = [model.header(name) for name in names]
    tensors = [
        entry
        for header in headers
        for name, entry in (header or {}).items()
        if name != "__metadata__"
    ]
    shapes = [entry.get("shape") for entry in tensors]
    if None in headers or not all(map(_is_shape, shapes)):
        return None
    total: int = sum(math.prod(shape) for shape in shapes if shape is not None)
    return total


def _weight_files(model: ModelFiles) -> list[str]:
    """The files that transformers loads: there may be others with the same weights."""
    index = model.read_object(INDEX) or {}
    parts = index.get("weight_map")
    named = {"model.safetensors"}
    if isinstance(parts, dict):
        named = {name for name in parts.values() if isinstance(name, str)}
    return [name for name in model.matching("*.safetensors") if name in named]


def _is_shape(shape: object) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= MOST_DIMS
        and all(type(size) is int and 0 <= size <= MOST_BYTES for size in shape)
    )


def _by_config(config: Mapping[str, Any]) -> int | None:
    """The weights of embeddings, attention and feed-forward blocks, by config.json alone."""
    if config.get("model_type") not in GATED:
        return None
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = [config.get(name) for name in (*names, "num_attention_heads")]
    heads = sizes[-1]
    key_heads = config.get("num_key_value_heads") or heads
    if not all(type(size) is int and size > 0 for size in (*sizes, key_heads)):
        return None
    vocabulary, width, inner, layers, heads = (int(size) for size in sizes if size is not None)
    head = config.get("head_dim") or width // heads
    if type(head) is not int:
        return None
    attention = 2 * width * head * (heads + int(key_heads or heads))
    return vocabulary * width + layers * (attention + 3 * width * inner)
