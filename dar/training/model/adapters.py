"""Adapters of peft: which kinds are trained, and what is checked before one is.

An adapter is allowed only if four things hold, which a test checks for each entry of `ALLOWED`:
without the adapter the policy is the base model, which is the reference; its log-probabilities
are the same when completions are sampled, when they are recorded, and in a plain forward pass; the
saved adapter loads as the trained model; and merging it into the base gives the trained model too.
Many kinds and options of peft break one of these without an error: they rewrite the base weights,
act only on some tokens, or need calls and loss terms of their own.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from dar.errors import InvalidRequestError, TrainingError

LanguageModel = PreTrainedModel | PeftModel
PARAM = "peft_config"
TARGETS = "method.dar.peft.target_modules"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHARED_BANK = "vblora_vector_bank"
"""Part of the names of weights that peft saves once, and that the layers of VB-LoRA share."""
SHOWN_NAMES = 16


class _Any:
    """Every value is allowed."""

    def __contains__(self, value: object) -> bool:
        return True


ANY = _Any()
COMMON: Mapping[str, Any] = {
    "peft_type": ANY,
    "task_type": (None, "CAUSAL_LM"),
    "base_model_name_or_path": ANY,
    "revision": ANY,
    "peft_version": ANY,
    "auto_mapping": ANY,
    "inference_mode": ANY,
    "target_modules": ANY,
    "exclude_modules": ANY,
    "layers_to_transform": ANY,
    "layers_pattern": ANY,
    "modules_to_save": ANY,
}
"""Options that every kind may have. Any other option keeps its default."""


def _sizes(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, ANY)


ALLOWED: Mapping[str, Mapping[str, Any]] = {
    "LORA": {
        **_sizes(
            "r",
            "lora_alpha",
            "lora_dropout",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
            "trainable_token_indices",
            "target_parameters",
            "ensure_weight_tying",
            "fan_in_fan_out",
        ),
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "mica"),
    },
    "BOFT": _sizes("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
    "C3A": _sizes("block_size"),
    "DEFT": _sizes("r"),
    "DELORA": _sizes("r", "delora_lambda"),
    "FOURIERFT": _sizes("n_frequency", "scaling"),
    "FROD": {},
    "GLORA": _sizes("r"),
    "GRALORA": _sizes("r", "alpha", "gralora_k"),
    "HIRA": _sizes("r"),
    "HRA": _sizes("r"),
    "IA3": _sizes("feedforward_modules"),
    "LN_TUNING": {},
    "LOHA": _sizes("r", "alpha"),
    "LOKR": _sizes("r", "alpha"),
    "MISS": _sizes("r"),
    "OFT": _sizes("r", "oft_block_size"),
    "OSF": {},
    "PEANUT": _sizes("r", "scaling"),
    "PSOFT": _sizes("r", "psoft_alpha"),
    "RANDLORA": _sizes("r", "randlora_alpha"),
    "ROAD": _sizes("group_size"),
    "SHIRA": _sizes("r"),
    "SUPERTUNING": _sizes("sparsity"),
    "TINYLORA": _sizes("r", "u"),
    "TRAINABLE_TOKENS": _sizes("token_indices"),
    "UNILORA": _sizes("r", "theta_d_length"),
    "VBLORA": _sizes("r", "num_vectors", "vector_length", "topk"),
    "VERA": _sizes("r"),
    "WAVEFT": _sizes("n_frequency", "scaling"),
}
"""Kinds of adapters that are trained, and for each the options that may differ from their default,
with their allowed values."""

FACTORS = ("lora_alpha", "alpha", "scaling", "randlora_alpha", "psoft_alpha", "delora_lambda")
"""Options by which the output of an adapter is multiplied: with 0 it could not be trained."""
DROPOUTS = ("lora_dropout",)
"""Probabilities of dropping the input of an adapter: with 1 nothing would be left."""
MODULE_NAMES = ("target_modules", "modules_to_save", "exclude_modules", "feedforward_modules")
"""Options that name modules of the model; a text is a pattern, which peft checks itself."""
MODULE_PATTERNS = ("rank_pattern", "alpha_pattern")
"""Options whose keys are patterns of modules."""
TOKEN_INDICES = ("trainable_token_indices", "token_indices")
"""Options that list tokens, or map modules to lists of tokens."""


def check_adapter(config: PeftConfig) -> None:
    """Reject a kind of adapter, or an option of it, that is not in `ALLOWED` or cannot be trained.

    Raises:
        InvalidRequestError: It is not, or cannot.
    """
    kind = _kind(config)
    if kind not in ALLOWED:
        raise InvalidRequestError(
            f"peft_config is of the type {type(config).__name__}, and adapters of the kind {kind} are not "
            "trained here: reference, log-probabilities, saved or merged weights would be wrong, "
            f"or were never checked; use LoraConfig, or one of {', '.join(sorted(ALLOWED))}",
            param=PARAM,
        )
    allowed = {**COMMON, **ALLOWED[kind]}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value in allowed.get(field.name, ()) or _is_default(field, value):
            continue
        only = [repr(one) for one in allowed.get(field.name, ())]
        raise InvalidRequestError(
            f"peft_config sets {field.name}={_shown(value)}, with which a {kind} adapter is not "
            "trained here: reference, log-probabilities, saved or merged weights would be wrong, "
            "or the option would have no effect; "
            + (f"use one of {', '.join(only)}" if only else "leave it out"),
            param=PARAM,
        )
    _check_numbers(config)


def _check_numbers(config: PeftConfig) -> None:
    """Reject factors of 0 and dropouts of 1, with which an adapter has no gradient.

    Also reject sizes that are not whole numbers: peft makes tensors of them.
    """
    sizes = [
        (field.name, getattr(config, field.name))
        for field in dataclasses.fields(config)
        if type(field.default) is int and field.name not in FACTORS
    ]
    ranks: Mapping[str, Any] = getattr(config, "rank_pattern", None) or {}
    sizes += [(f"rank_pattern[{name!r}]", value) for name, value in ranks.items()]
    chosen_by_peft = {
        field.name
        for field in dataclasses.fields(config)
        if type(field.default) is int and field.default < 0
    }
    for name, value in sizes:
        least = -1 if name in chosen_by_peft else 0
        if type(value) is not int or value < least:
            raise InvalidRequestError(
                f"peft_config sets {name}={value!r}, but must have a whole number, not below 0",
                param=PARAM,
            )
    factors: list[tuple[str, Any]] = [(name, getattr(config, name, None)) for name in FACTORS]
    patterns: Mapping[str, Any] = getattr(config, "alpha_pattern", None) or {}
    factors += [(f"alpha_pattern[{name!r}]", value) for name, value in patterns.items()]
    for name, value in factors:
        if value is None:
            continue
        if not _is_plain_number(value) or not math.isfinite(value) or value <= 0:
            raise InvalidRequestError(
                f"peft_config sets {name}={value!r}, but must have a finite number above 0, by "
                "which the adapter's output is multiplied",
                param=PARAM,
            )
    for name in DROPOUTS:
        dropout: Any = getattr(config, name, 0.0)
        if not _is_plain_number(dropout) or not 0 <= dropout < 1:
            raise InvalidRequestError(
                f"peft_config sets {name}={dropout!r}, but must have a probability of at least 0 and "
                "below 1, as an adapter without input cannot be trained",
                param=PARAM,
            )


def _is_plain_number(value: object) -> bool:
    """Whether ``value`` is a number that ``adapter_config.json`` can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_places(model: PreTrainedModel, config: PeftConfig) -> None:
    """Reject an adapter that names modules or tokens that the model lacks.

    peft itself rejects one only if none of its target modules exists.

    Raises:
        InvalidRequestError: One is not there.
    """
    paths = [name for name, _ in model.named_modules() if name]
    weights = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for option in MODULE_NAMES:
        named = getattr(config, option, None)
        if named and not isinstance(named, str) and named != ["all-linear"]:
            _refuse_missing(option, [one for one in named if not _ends_one(one, paths)], paths)
    parameters = getattr(config, "target_parameters", None) or ()
    missing = [one for one in parameters if not _ends_one(one, weights)]
    _refuse_missing("target_parameters", missing, weights)
    for option in MODULE_PATTERNS:
        patterns = getattr(config, option, None) or {}
        missing = [one for one in patterns if not _matches_one(one, [*paths, *weights])]
        _refuse_missing(option, missing, paths)
    _check_layers(config, getattr(model.config.get_text_config(), "num_hidden_layers", None))
    embeddings: Any = model.get_input_embeddings()
    _check_tokens(config, int(embeddings.weight.shape[0]))


def _ends_one(name: object, paths: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _matches_one(pattern: str, paths: Iterable[str]) -> bool:
    try:
        compiled = re.compile(rf"(.*\.)?({pattern})")  # as peft does
    except re.error:
        return False
    return any(compiled.fullmatch(path) for path in paths)


def _refuse_missing(option: str, missing: list[Any], paths: Iterable[str]) -> None:
    if not missing:
        return
    names = {path.rpartition(".")[2] for path in paths}
    raise InvalidRequestError(
        f"{option} of the adapter names {' and '.join(map(repr, sorted(map(str, missing))))}, which "
        f"the model lacks; there are: {_shown_names(names)}",
        param=TARGETS if option == "target_modules" else PARAM,
    )


def _shown_names(names: Iterable[str]) -> str:
    shown = sorted(name for name in names if not name.isdigit())
    return ", ".join(shown[:SHOWN_NAMES]) + (", …" if len(shown) > SHOWN_NAMES else "")


def _check_layers(config: PeftConfig, count: int | None) -> None:
    """Reject numbers of layers that the model lacks."""
    given: Any = getattr(config, "layers_to_transform", None)
    for layer in [given] if isinstance(given, int) else given or ():
        if count is not None and not 0 <= layer < count:
            raise InvalidRequestError(
                f"layers_to_transform of the adapter has {layer!r}, but the model has layers 0 to "
                f"{count - 1} only",
                param=PARAM,
            )


def _check_tokens(config: PeftConfig, vocabulary: int) -> None:
    """Reject indices of tokens that the model lacks, which peft takes for others or fails with."""
    for option in TOKEN_INDICES:
        given: Any = getattr(config, option, None) or ()
        lists = given.values() if isinstance(given, Mapping) else [given]
        for index in (one for indices in lists for one in indices):
            if not isinstance(index, Integral) or not 0 <= int(index) < vocabulary:
                raise InvalidRequestError(
                    f"{option} of the adapter has {index!r}, but the model has tokens 0 to "
                    f"{vocabulary - 1} only",
                    param=PARAM,
                )


def check_policy(model: nn.Module) -> None:
    """Reject a model that was given with adapters that cannot be trained.

    Raises:
        InvalidRequestError: It has several adapters or a merged one, transformers has added the
            adapter, or `check_adapter` rejects it.
    """
    if isinstance(model, PeftMixedModel):
        raise InvalidRequestError(
            "the model is a PeftMixedModel, which can be neither saved nor merged as one adapter; "
            "use peft.get_peft_model without mixed=True",
            param="model",
        )
    if isinstance(model, PeftModel):
        names = list(model.peft_config)
        if len(names) != 1:
            raise InvalidRequestError(
                f"the model has {len(names)} adapters ({', '.join(map(repr, names))}), but only "
                "one can be trained; remove the others with delete_adapter",
                param="model",
            )
        check_adapter(model.peft_config[names[0]])
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InvalidRequestError(
            "the model has an adapter that transformers has added (add_adapter, load_adapter, or "
            "from_pretrained of an adapter's folder); add it with peft.get_peft_model, or load it "
            "with peft.PeftModel.from_pretrained(base, folder, is_trainable=True)",
            param="model",
        )
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise InvalidRequestError(
                "the model's adapter is merged into its weights; call unmerge_adapter before",
                param="model",
            )


def adapter_name(model: PeftModel) -> str:
    """Name of the model's only adapter."""
    (name,) = model.peft_config
    return str(name)


def published_base(name: str) -> str:
    """What ``adapter_config.json`` calls a base model that no hub has.

    A path, as a mere name would be taken for a model of the hub, which may be a stranger's.
    """
    return f"./{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-.') or 'base'}"


def local_base(source: str) -> str:
    """A base model as ``adapter_config.json`` names it: an absolute path, or a hub id."""
    return str(Path(source).resolve()) if source and Path(source).is_dir() else source


def is_resized(model: LanguageModel, source: str) -> bool:
    """Whether ``model`` has more or fewer token embeddings than the files that it is made of."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        vocabulary = config.get_text_config().vocab_size
    except (OSError, ValueError, KeyError, AttributeError):
        return False  # nobody can load that base, so nothing can be missing from it
    return bool(vocabulary != model.config.get_text_config().vocab_size)


def save_adapter(
    model: PeftModel, folder: Path, weights: Mapping[str, Tensor] | None, *, with_embeddings: bool
) -> None:
    """Write the adapter into ``folder`` itself, whatever its name is.

    Args:
        model: The policy.
        folder: Where ``adapter_config.json`` is written.
        weights: The gathered weights of a sharded model; None: the model has them itself.
        with_embeddings: Whether the token embeddings are saved too: see `is_resized`.
    """
    # peft would ask the hub for the embeddings of the base, and saves only some of those that grew
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    name = adapter_name(model)
    if name != "default":
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()
    if with_embeddings:
        whole = model.state_dict() if weights is None else weights
        own = {key: whole[key].detach().cpu().contiguous() for key in _embedding_keys(model)}
        file = folder / ADAPTER_WEIGHTS
        unshared = {key: tensor.clone() for key, tensor in own.items()}
        save_file(unshared | load_file(file), file, metadata={"format": "pt"})


def _embedding_keys(model: PeftModel) -> list[str]:
    """Names of the base model's token embeddings and output weights, which an adapter may wrap."""
    base: Any = model.get_base_model()
    layers = base.get_input_embeddings(), base.get_output_embeddings()
    own = {id(_innermost(layer).weight) for layer in layers if layer is not None}
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if id(parameter) in own]


def resize_to(model: PreTrainedModel, weights: Path) -> None:
    """Give ``model`` as many token embeddings as an adapter's file has, if it has any."""
    first: Any = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is first)
    inside = r"((token_adapter\.)?base_layer\.|original_module\.)?"
    key = re.compile(rf"base_model\.model\.{re.escape(name)}\.{inside}weight")
    with safe_open(weights, "pt") as file:
        rows = {file.get_slice(one).get_shape()[0] for one in file.keys() if key.fullmatch(one)}  # noqa: SIM118 - the file is no dict
    if rows and rows != {first.weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def check_names(model: PeftModel, folder: Path) -> None:
    """Reject a file that lacks weights of an adapter, or has others.

    peft leaves what is missing at its start, where an adapter changes nothing, and skips what it
    does not know.

    Args:
        model: A model with the adapter.
        folder: The adapter's.

    Raises:
        TrainingError: It is such a file.
    """
    report = model.load_adapter(str(folder), adapter_name(model))  # the only call that returns one
    lacking = [one for one in report.missing_keys if SHARED_BANK not in one]
    for names, what in ((lacking, "lacks"), (report.unexpected_keys, "has unknown weights")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise TrainingError(
                f"{folder / ADAPTER_WEIGHTS} {what} {', '.join(sorted(names)[:3])}{more}, so it "
                f"does not fit {folder / ADAPTER_CONFIG} or the model; give the files of one "
                "adapter and its own base",
                param="model",
            )


def untie_adapted(model: PeftModel) -> None:
    """Give the output layer its own weights if an adapter changes one that shares them.

    Otherwise the adapter of one layer would be merged into the other too.
    """
    base: Any = model.get_base_model()
    layers = base.get_input_embeddings(), base.get_output_embeddings()
    if not any(isinstance(one, BaseTunerLayer | AuxiliaryTrainingWrapper) for one in layers):
        return
    first, last = (_innermost(layer) for layer in layers)
    if first is None or last is None or first.weight is not last.weight:
        return
    last.weight = nn.Parameter(last.weight.detach().clone(), requires_grad=False)


def settle_tying(model: PreTrainedModel) -> None:
    """Make the config of merged weights say whether input and output layer are the same.

    Weights that are equal are shared again. A config that says so where they differ would lose one
    of them when the model is saved.
    """
    config: Any = model.config
    first: Any = model.get_input_embeddings()
    last: Any = model.get_output_embeddings()
    if not model.all_tied_weights_keys or first is None or last is None:
        return
    if first.weight is last.weight:
        return
    if first.weight.equal(last.weight):
        last.weight = first.weight
        config.tie_word_embeddings = True  # peft has noticed that they lay in two places
        return
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def kind_of(config: PeftConfig) -> str:
    """The kind of an adapter as it is usually written: ``LoRA``, else peft's name."""
    kind = _kind(config)
    return "LoRA" if kind == "LORA" else kind


def _kind(config: PeftConfig) -> str:
    kind: Any = config.peft_type
    return str(getattr(kind, "value", kind))


def _is_default(field: dataclasses.Field[Any], value: object) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return bool(value == field.default)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _innermost(layer: Any) -> Any:  # noqa: ANN401 - the wrappers of peft share no type
    """The layer of the base model inside the wrappers of peft."""
    while layer is not None:
        inner = getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)
        if inner is None:
            return layer
        layer = inner
    return None
