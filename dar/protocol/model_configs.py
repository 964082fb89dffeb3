"""What a model's config.json says, read without torch: code of its own, context, labels."""

from collections.abc import Mapping
from typing import Any

CODE_KEYS = frozenset({"auto_map", "_attn_implementation_internal", "trust_remote_code"})
"""Keys of a config.json that have loaded code from a hub: auto_map by design, the others through
CVE-2026-4372 and CVE-2026-5241. A built-in architecture needs none of them."""
CONTEXT_KEYS = ("max_position_embeddings", "n_positions")
"""Names of the context length; ``n_positions`` in the family of GPT-2."""
ROPE_KEYS = ("rope_parameters", "rope_scaling")
"""Names of the options of RoPE; ``rope_scaling`` in older files."""
ORIGINAL_LENGTH = "original_max_position_embeddings"
USUAL_LABELS = 2
"""Labels of a classifier whose config.json names none."""


def refused_code(name: str, config: Mapping[str, Any]) -> str | None:
    """Why a model is refused whose config.json asks to run its own code; None if it does not.

    Args:
        name: The model, for the message.
        config: Its config.json, parsed.
    """
    found = sorted(CODE_KEYS & config.keys())
    if found:
        return (
            f"the model {name!r} asks to run its own code ({', '.join(found)} in config.json), "
            "which is never done here; use a model of an architecture that transformers has built "
            "in"
        )
    parts = (value for value in config.values() if isinstance(value, Mapping))
    return next((why for part in parts if (why := refused_code(name, part))), None)


def context_of(config: Mapping[str, Any]) -> int | None:
    """Longest sequence of a model in tokens; None if its config.json does not say."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    found = next((text[key] for key in CONTEXT_KEYS if key in text), None)
    return found if type(found) is int and found > 0 else None


def steady_length(config: Mapping[str, Any]) -> int | None:
    """Longest sequence for which RoPE is that of every shorter one; None if it never changes.

    The kind ``longrope`` (once ``su``, in Phi-3 also ``yarn``) turns all keys otherwise as soon as
    a sequence is longer. Those that were kept from before, and padded rows beside it, are wrong.
    """
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    given = [text[key] for key in ROPE_KEYS if isinstance(text.get(key), Mapping)]
    # one for all layers, or one for each kind of layer
    parts = [*given, *(part for one in given for part in one.values() if isinstance(part, Mapping))]
    found = [
        part.get(ORIGINAL_LENGTH, text.get(ORIGINAL_LENGTH))
        for part in parts
        if "longrope" in (part.get("rope_type"), part.get("type")) or "short_factor" in part
    ]
    return min((one for one in found if type(one) is int and one > 0), default=None)


def rope_change(length: int) -> str:
    """Why no sequence may be longer than `steady_length`, for a message."""
    return (
        f"the model's RoPE (longrope) changes for every position of a sequence of over {length} "
        "tokens, so that longer ones could be neither sampled nor measured exactly"
    )


def labels_of(config: Mapping[str, Any]) -> int | None:
    """Numbers that a model gives per text as a classifier; None if its config.json says nothing."""
    labels, count = config.get("id2label"), config.get("num_labels")
    if isinstance(labels, Mapping):
        return len(labels)
    if type(count) is int:
        return count
    return USUAL_LABELS if "model_type" in config else None
