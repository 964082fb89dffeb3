"""The most memory that a trainer holds at once, by arithmetic from its model's config.json.

`service.jobs.memory` has what it holds all the time. On top comes the larger of two: the tensors
that the backward pass over the largest batch of completions needs, and the cache of the sampler.
The bounds of a batch are the same as in the trainer, which imports torch and is not imported here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dar.protocol.model_configs import context_of
from dar.protocol.spec import DARSpec
from service.jobs.memory import FLOAT, HALF, MOST_BYTES, Memory, least_memory
from service.jobs.model_checks import ModelFiles

PASS_ROWS, PASS_TOKENS, PASS_LOGITS = 64, 16_384, 2**28
"""Most sequences, positions and logits of one pass with gradients (`dar.training.model`)."""
SAMPLED_ROWS, SAMPLED_TOKENS = 512, 2**19
"""Most sequences that are sampled at once, and positions in their cache."""
LOGIT_COPIES = 3
"""Logits, their log-softmax and its gradient."""
NORMS, HEADS, INNER = 6, 6, 4
"""Tensors of the model's width, of the attention's and of the feed-forward block's that one layer
keeps for the backward pass."""
BYTES_OF_TOKEN = 3.5
"""Of a prompt's text, where only the size of the file is known."""
USUAL_PROMPT = 256
"""Tokens of a prompt of which nothing is known."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes that a trainer holds at most, in one process."""

    on_cpu: int
    on_gpu: int


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of a transformer with gated feed-forward blocks or plain ones."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads_width: int
    cached_width: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Sizes | None":
        """The sizes in a config.json; None: it does not have them."""
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        found = [config.get(name) for name in names]
        if not all(type(size) is int and size > 0 for size in found):
            return None
        vocabulary, width, layers, heads = (int(size) for size in found if size is not None)
        inner = config.get("intermediate_size") or 4 * width
        head = config.get("head_dim") or width // heads
        cached = config.get("num_key_value_heads") or heads
        if not all(type(size) is int and size > 0 for size in (inner, head, cached)):
            return None
        return cls(vocabulary, width, inner, layers, heads * head, cached * head)


def prompt_tokens(file_bytes: int, rows: int) -> int:
    """Tokens of a prompt of medium length, by the size of the file of prompts."""
    return max(1, round(file_bytes / max(rows, 1) / BYTES_OF_TOKEN))


def peak_memory(spec: DARSpec, model: ModelFiles, prompt: int | None) -> Peak | None:
    """The peak of a job that starts from a model; None: not known.

    Args:
        spec: Of the job.
        model: Its files.
        prompt: Tokens of a prompt; None: not known.
    """
    always, sizes = least_memory(spec, model), _Sizes.of(model.config)
    if always is None or sizes is None:
        return None
    on_cpu = FLOAT if spec.precision in {"auto", "fp32"} else HALF
    on_gpu = FLOAT if spec.precision == "fp32" else HALF
    usual = USUAL_PROMPT if prompt is None else prompt
    most = spec.sampling.max_prompt_length or context_of(model.config)
    length = usual if most is None else min(usual, most)
    peak = Peak(
        always.on_cpu + _transient(spec, sizes, length, on_cpu),
        _always_on_gpu(spec, always) + _transient(spec, sizes, length, on_gpu),
    )
    return peak if max(peak.on_cpu, peak.on_gpu) <= MOST_BYTES else None


def _always_on_gpu(spec: DARSpec, always: Memory) -> int:
    """The frozen weights under an adapter are of half precision there."""
    return always.on_cpu if spec.peft is None else always.beside_gpus


def _transient(spec: DARSpec, sizes: _Sizes, prompt: int, number: int) -> int:
    """Bytes that come and go: of the backward pass, or of the sampler's cache."""
    completion = spec.sampling.max_new_tokens
    length = prompt + completion
    hyper = spec.hyperparameters
    wanted = -(-hyper.batch_size * hyper.dar_k // spec.resources.processes)
    by_logits = PASS_LOGITS // ((completion + 1) * sizes.vocabulary)
    rows = max(1, min(wanted, PASS_ROWS, PASS_TOKENS // length, by_logits))
    of_layer = (
        NORMS * sizes.width * FLOAT + (HEADS * sizes.heads_width + INNER * sizes.inner) * number
    )
    backward = rows * length * sizes.layers * of_layer
    backward += LOGIT_COPIES * rows * (completion + 1) * sizes.vocabulary * FLOAT
    at_once = max(1, min(wanted, SAMPLED_ROWS, SAMPLED_TOKENS // length))
    cache = at_once * length * sizes.layers * 2 * sizes.cached_width * number
    return max(backward, 0 if spec.rewards is None else cache)
