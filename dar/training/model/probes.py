"""What a model must be before it is trained, whatever its architecture: finite, causal, repeatable.

A model that is not trains without an error, and all its numbers are wrong. So this is measured when
a model is loaded, not read from its config, as the options differ between architectures.
"""

import torch
from peft import PeftModel
from torch import Tensor, nn

from dar.errors import InvalidRequestError, TrainingError
from dar.training.model.adapters import PARAM, LanguageModel

PROBE_TOKENS = 8
"""Length of the sequences that show whether a model is causal."""
MOST_ROUNDING = 1e-4
"""Largest difference of two equal logits by rounding, as a fraction of the largest logit."""
SHOWN_WEIGHTS = 3
UNSCALED = frozenset({torch.float16})
"""Number formats in which AdamW's epsilon, 1e-8, is 0, so that its first step divides by 0."""


def check_finite(model: nn.Module, what: str, *, param: str = "model") -> None:
    """Reject a model with a weight that is NaN or infinite.

    Args:
        model: The model.
        what: Its name in the error.
        param: The parameter that names it.

    Raises:
        TrainingError: There is such a weight.
    """
    broken = _broken_weights(model)
    if broken:
        more = ", …" if len(broken) > SHOWN_WEIGHTS else ""
        raise TrainingError(
            f"{what} has weights that are NaN or infinite, in {', '.join(broken[:SHOWN_WEIGHTS])}"
            f"{more}; its files are damaged, or an earlier training of it has diverged: use another "
            "copy",
            param=param,
        )


def check_in_memory(model: LanguageModel, what: str, *, param: str) -> None:
    """Reject a model of which a part is on a disk or was never loaded: on the device ``meta``.

    Raises:
        InvalidRequestError: There is such a part.
    """
    away = [name for name, weight in model.named_parameters() if weight.is_meta]
    if away:
        raise InvalidRequestError(
            f"{what} has {len(away)} weights that are not in memory, such as {away[0]} (on the device "
            "meta); load it without device_map and offloading, so that all weights are on one device",
            param=param,
        )


def is_finite(model: nn.Module) -> bool:
    """Whether no weight is NaN or infinite."""
    return not _broken_weights(model)


def _broken_weights(model: nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if not _is_number(weight)]


def _is_number(weight: Tensor) -> bool:
    weight = weight.detach()
    return not weight.is_floating_point() or weight.is_meta or bool(weight.isfinite().all())


@torch.no_grad()
def check_causal(model: LanguageModel, *, param: str = "model") -> None:
    """Reject a model whose logits depend on later tokens.

    Its log-probabilities of a whole sequence are not those that it was sampled with. Two sequences
    that differ in their last token alone are compared.

    Raises:
        TrainingError: Logits depend on later tokens, are not finite, or cannot be computed.
    """
    length, vocabulary = _probe_size(model)
    if length < 2 or vocabulary < 2:  # there is nothing to compare
        return
    device = next(model.parameters()).device
    ids_2T = (torch.arange(length, device=device) % vocabulary).repeat(2, 1)
    ids_2T[1, -1] = (ids_2T[1, -1] + 1) % vocabulary
    is_training = model.training
    model.eval()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        logits_2TV: Tensor = model(
            input_ids=ids_2T,
            attention_mask=torch.ones_like(ids_2T),
            position_ids=torch.arange(length, device=device).repeat(2, 1),
            use_cache=False,
            logits_to_keep=length,
        ).logits
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{type(base).__name__} cannot read a plain text ({error}); use a decoder-only model "
            "of another architecture",
            param=param,
        ) from error
    model.train(is_training)
    earlier_2TV = logits_2TV[:, :-1].double()
    if not earlier_2TV.isfinite().all():
        raise TrainingError(
            f"{type(base).__name__} returns logits that are NaN or infinite, though its weights "
            f"are not; its number format is {logits_2TV.dtype}: load it in float32",
            param=param,
        )
    rounding = max(MOST_ROUNDING, 4 * torch.finfo(logits_2TV.dtype).eps)
    difference = (earlier_2TV[0] - earlier_2TV[1]).abs().max()
    if difference > rounding * earlier_2TV.abs().max():
        raise TrainingError(
            f"{type(base).__name__} is not causal: its logits depend on later tokens, so the "
            "log-probabilities of a completion would not be those that it was sampled with; use a "
            "decoder-only model, and turn off options of its config such as "
            "use_bidirectional_attention, or is_decoder=false",
            param=param,
        )


def _probe_size(model: LanguageModel) -> tuple[int, int]:
    """Length of a probe and size of the vocabulary."""
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or PROBE_TOKENS
    return min(PROBE_TOKENS, context), int(text.vocab_size)


@torch.no_grad()
def check_repeatable(model: LanguageModel, *, param: str = "model") -> None:
    """Reject a model whose logits differ between two passes in training mode.

    Noise that is left when dropout is off would be in every log-probability. An adapter's own
    dropout is no such noise: it acts in training passes only, as it should.

    Raises:
        TrainingError: The logits differ.
    """
    device = next(model.parameters()).device
    is_training = model.training
    model.train()
    for path, module in model.named_modules():
        if "lora_dropout" in path:
            module.eval()
    length, vocabulary = _probe_size(model)
    places_1T = torch.arange(length, device=device)[None]
    given = {
        "input_ids": places_1T % vocabulary,
        "attention_mask": torch.ones_like(places_1T),
        "position_ids": places_1T,
    }
    options = {"use_cache": False, "logits_to_keep": length}
    first_1TV, second_1TV = (model(**given, **options).logits for _ in range(2))
    model.train(is_training)
    rounding = max(MOST_ROUNDING, 4 * torch.finfo(first_1TV.dtype).eps)
    difference = (first_1TV.double() - second_1TV.double()).abs().max()
    if difference > rounding * first_1TV.abs().max():
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        raise TrainingError(
            f"{type(base).__name__} returns other logits in each training pass, so its "
            "log-probabilities would be those of no model; set every dropout and jitter of its "
            "config to 0",
            param=param,
        )


def check_number_formats(model: LanguageModel) -> None:
    """Reject float16 for weights that are trained themselves.

    Raises:
        InvalidRequestError: A trained weight is float16.
    """
    if any(p.requires_grad and p.dtype in UNSCALED for p in model.parameters()):
        raise InvalidRequestError(
            "weights that are trained must not be float16, in which the optimizer's steps become "
            "NaN; load the model in float32 (with fp16=True for faster passes) or in bfloat16, or "
            "train an adapter",
            param="model",
        )


def check_dora(model: LanguageModel) -> None:
    """Reject DoRA on a weight with a row of zeros, by whose norm it would divide.

    Raises:
        InvalidRequestError: There is such a row.
    """
    for name, magnitudes in model.named_parameters():
        layer, found, _ = name.partition(".lora_magnitude_vector")
        if found and not magnitudes.is_meta and (magnitudes == 0).any():
            raise InvalidRequestError(
                "use_dora divides by the norm of each row of a weight, and "
                f"{layer.removeprefix('base_model.model.')} has rows of zeros; leave it out of "
                "target_modules, or leave use_dora out",
                param=PARAM,
            )
