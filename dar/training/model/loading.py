"""Loads models without running code that comes with them, and describes them."""

import contextlib
import copy
import hashlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file, hf_api

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol import model_configs
from dar.protocol.model_configs import refused_code
from dar.protocol.spec import LoraSpec
from dar.training.data.load_errors import blame, first_line
from dar.training.model import adapters, probes

LanguageModel = adapters.LanguageModel

SKETCHED_VALUES = 256
"""Leading values of each parameter in a sketch: enough to distinguish models, and cheap."""
PATH_STARTS = ("/", ".", "~")
"""How no id of the hub begins."""
COMPUTED = (
    r"(^|\.)(attn|attention)(\.attention)?\.(bias|masked_bias|causal_mask)$"
    r"|(^|\.)(inv_freq|position_ids)$"
)
"""Masks, frequencies and positions in the files of older models, which are computed today."""
OTHER_SENSES = r"(^|[._])(vision|visual|image|audio|speech|multi_?modal)"
"""Weights that read images or sounds, in the files of a model of which the text part is loaded."""
OPTIONAL_HEADS = r"(^|\.)(lm_head|lm_predictions|mask_predictions|cls|pooler|v_head)\."
"""Layers beside the one that gives a classifier's number, such as those of its pretraining."""
OUTPUT_OPTIONS: Mapping[str, bool] = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
"""What a forward pass must return here. Attentions also keep a config from being saved."""


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    is_offline: bool = False,
    token: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model from safetensors; built-in architectures only.

    Args:
        name: Folder or hub id.
        dtype: Number format of the weights; ``auto``: as they were saved.
        is_offline: Whether access to the hub is forbidden.
        token: Token of the hub; default: that of this machine's user.

    Raises:
        TrainingError: There is no such model, it is an adapter, it needs code of its own, it is not
            a causal language model, or its files lack some of its weights or have others.
        HubUnreachableError: The hub cannot be reached.
    """
    if (Path(name) / adapters.ADAPTER_CONFIG).is_file():
        raise TrainingError(
            f"the model {str(name)!r} is an adapter, not a whole model; merge it into its base "
            f"first: dar merge {name} -o FOLDER",
            param="model",
        )

    def load(path: str, **access: Any) -> Any:  # noqa: ANN401 - what `from_pretrained` returns
        _check_generation_config(path, access)
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, **access
        )

    model: PreTrainedModel
    model, report = from_safetensors(
        load,
        name,
        "a causal language model",
        param="model",
        is_offline=is_offline,
        token=token,
    )
    check_weights(report, name, "causal language model", param="model")
    _admit_untied(model)
    settle_outputs(model)
    make_savable(model)
    return model


def from_safetensors(
    load: Callable[..., Any],
    name: str | Path,
    kind: str,
    *,
    param: str,
    is_offline: bool,
    token: str | None,
) -> Any:  # noqa: ANN401 - what `load` returns
    """Call a ``from_pretrained`` of transformers, for safetensors and built-in architectures only.

    Args:
        load: The function, with further arguments bound.
        name: Folder or hub id.
        kind: What the model is loaded as, for the error.
        param: The parameter that names the model.
        is_offline: Whether access to the hub is forbidden.
        token: Token of the hub; None: that of this machine's user.

    Raises:
        TrainingError: There is no such model, it needs code of its own, or it is of another kind.
        HubUnreachableError: The hub cannot be reached.
    """
    path = str(name)
    access: dict[str, Any] = {"local_files_only": is_offline, "token": token}
    what = f"the {param.replace('_', ' ')} {path!r}"
    failed = f"{what} cannot be loaded as {kind} from safetensors"
    if path.startswith(PATH_STARTS) and not Path(path).is_dir():
        raise TrainingError(f"{failed}: there is no such folder", param=param)
    try:
        _check_config(path, param, access)
        # read by itself, so that its faults are not those of weights or tokenizer
        AutoConfig.from_pretrained(path, trust_remote_code=False, **access)
        _check_index(Path(path))
        return load(path, trust_remote_code=False, use_safetensors=True, **access)
    except Exception as error:  # noqa: BLE001 - odd files raise anything in transformers
        blame(error, what, failed, param=param, is_offline=is_offline)


def _check_index(folder: Path) -> None:
    """Reject an index of weights that names files outside of its folder.

    Raises:
        TrainingError: It does, or is no index.
    """
    file = folder / SAFE_WEIGHTS_INDEX_NAME
    if not file.is_file():
        return
    index = json.loads(file.read_text(encoding="utf-8"))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise TrainingError(f"{file} has no weight_map, so it is no index", param="model")
    for name in set(map(str, places.values())):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise TrainingError(
                f"{file} names {name!r}, which is outside of its folder; the weights of a model "
                "must lie beside its config",
                param="model",
            )


def _check_config(path: str, param: str, access: Mapping[str, Any]) -> None:
    """Reject a model by what its config.json says.

    Raises:
        TrainingError: It is not a JSON object, or it requires custom code.
    """
    config: object = None
    # transformers uses the content as an object without looking
    with contextlib.suppress(AttributeError, TypeError):
        config, _ = PreTrainedConfig.get_config_dict(path, **access)
    if not isinstance(config, Mapping):
        what = f"the config.json of the {param.replace('_', ' ')} {path!r}"
        raise TrainingError(
            f"{what} is not a JSON object, so the model cannot be loaded; install the model again",
            param=param,
        )
    reject_code(path, config)


def _check_generation_config(path: str, access: Mapping[str, Any]) -> None:
    """Reject a generation config that is damaged: transformers would leave it out without a word.

    Raises:
        TrainingError: It is no JSON.
    """
    hub = {name: access[name] for name in ("local_files_only", "token")}
    found = cached_file(
        path,
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    try:
        json.loads("{}" if found is None else Path(found).read_bytes())
    except ValueError as error:
        raise TrainingError(
            f"the {GENERATION_CONFIG_NAME} of the model {path!r} is damaged ({first_line(error)}), "
            "and the tokens that end an answer may stand only there; install the model again",
            param="model",
        ) from error


def check_weights(
    report: Mapping[str, Collection[str]],
    name: str | Path,
    kind: str,
    *,
    param: str,
    optional: str | None = None,
) -> None:
    """Reject a model whose files and config do not have the same weights.

    What is in no file would be random, and what the config has no place for would be dropped.
    transformers itself leaves out what it knows to be of no use.

    Args:
        report: What `from_pretrained` says of the weights.
        name: Folder or hub id.
        kind: What the model was loaded as.
        param: The parameter that names the model.
        optional: A pattern of further weights that the model may do without.

    Raises:
        TrainingError: Some are missing, or left over.
    """
    if missing := sorted(report["missing_keys"]):
        raise TrainingError(
            f"the model {str(name)!r} is no {kind}: its weights lack "
            f"{', '.join(missing[: probes.SHOWN_WEIGHTS])}, which would be random",
            param=param,
        )
    harmless = re.compile("|".join(filter(None, (COMPUTED, OTHER_SENSES, optional))))
    unused = [key for key in sorted(report["unexpected_keys"]) if not harmless.search(key)]
    if unused:
        more = (
            f" and {len(unused) - probes.SHOWN_WEIGHTS} more"
            if len(unused) > probes.SHOWN_WEIGHTS
            else ""
        )
        raise TrainingError(
            f"the model {str(name)!r} is no {kind} of the size that its config.json says: its "
            f"files also have {', '.join(unused[: probes.SHOWN_WEIGHTS])}{more}, which would be dropped; "
            "use the config.json that belongs to the files, or a model of another kind",
            param=param,
        )


def _admit_untied(model: PreTrainedModel) -> None:
    """Make the config say that input and output layer differ if the files have two of them.

    transformers then does not tie them, whatever the config says, but others who read it would.
    """
    first: Any = model.get_input_embeddings()
    last: Any = model.get_output_embeddings()
    if first is None or last is None or first.weight is last.weight:
        return
    config: Any = model.config
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def settle_outputs(model: LanguageModel) -> None:
    """Have forward passes return logits by name, and nothing else that takes memory."""
    for config in _with_parts(model.config):
        for name, value in OUTPUT_OPTIONS.items():
            if getattr(config, name, value) != value:
                setattr(config, name, value)


def _with_parts(config: Any) -> Iterator[Any]:  # noqa: ANN401 - parts have classes of their own
    yield config
    for part in list(vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            yield from _with_parts(part)


def make_savable(model: LanguageModel) -> None:
    """Check that checkpoints can be saved, and repair what makes no difference to training.

    transformers loads configs that it then rejects when they are saved, at the first checkpoint.
    It takes a generation config that sets a temperature and no sampling, until the special tokens
    are aligned with the tokenizer's when training begins.

    Raises:
        TrainingError: The config or the generation config could not be saved.
    """
    config, generation = model.config, getattr(model, "generation_config", None)
    what = "config"
    try:
        if hasattr(config, "validate"):
            config.validate()
        config.to_json_string()
        if generation is not None:
            what = "generation config"
            _let_sample(generation)
            generation.validate(strict=True)
            generation.to_json_string()
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise TrainingError(
            f"the {what} of the model could not be saved with a checkpoint: "
            f"{' '.join(str(error).split())}; change it so that transformers accepts it",
            param="model",
        ) from error


def _let_sample(generation: GenerationConfig) -> None:
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def reject_code(name: str | Path, config: Mapping[str, Any]) -> None:
    """Reject a model that requires custom code.

    Raises:
        TrainingError: It requires custom code.
    """
    if why := refused_code(str(name), config):
        raise TrainingError(why, param="model")


def load_tokenizer(
    name: str | Path, *, is_offline: bool = False, token: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Args:
        name: Folder or hub id of the model.
        is_offline: Whether access to the hub is forbidden.
        token: Token of the hub; default: that of this machine's user.

    Raises:
        TrainingError: There is none.
        HubUnreachableError: The hub cannot be reached.
    """
    try:
        with _hub_account(token):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(name), trust_remote_code=False, local_files_only=is_offline, token=token
            )
    except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself
        what = f"the tokenizer of the model {str(name)!r}"
        failed = f"the model {str(name)!r} has no tokenizer that can be loaded"
        blame(error, what, failed, param="model", is_offline=is_offline)
    return tokenizer


@contextlib.contextmanager
def _hub_account(token: str | None) -> Iterator[None]:
    """Have transformers use ``token`` where it does not pass on what it was given.

    5.23 lists the files beside a tokenizer, and asks what Mistral's were made from, without it.
    """
    api = hf_api()
    before = api.token
    api.token = before if token is None else token
    try:
        yield
    finally:
        api.token = before


def merge_adapters(model: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """Merge adapters into the weights of ``model``, in order.

    Raises:
        TrainingError: A folder holds no safetensors adapter for this model.
    """
    for folder in folders:
        if not (folder / adapters.ADAPTER_WEIGHTS).is_file():
            raise TrainingError(
                f"the adapter {folder} has no {adapters.ADAPTER_WEIGHTS}", param="model"
            )
        adapters.check_adapter(read_adapter_config(folder))
        try:
            with _quiet_peft():
                adapters.resize_to(model, folder / adapters.ADAPTER_WEIGHTS)
                adapted = PeftModel.from_pretrained(model, str(folder))
                adapters.check_names(adapted, folder)
                adapters.untie_adapted(adapted)
                model = adapted.merge_and_unload()
        except Exception as error:  # noqa: BLE001 - odd files raise anything in peft and safetensors
            what = f"the adapter {folder}"
            failed = f"{what} does not fit the model, or its files are damaged"
            blame(error, what, failed, param="model", is_offline=True)
        adapters.settle_tying(model)
    return model.requires_grad_(requires_grad=True)  # peft has frozen it


def read_adapter_config(folder: Path) -> PeftConfig:
    """The config of the adapter in ``folder``.

    Raises:
        TrainingError: It is damaged, or of no adapter that peft knows.
    """
    file = folder / adapters.ADAPTER_CONFIG
    failed = f"{file} is not the config of an adapter"
    try:
        if why := _unlike_adapter(json.loads(file.read_text(encoding="utf-8"))):
            raise TrainingError(f"{failed}: {why}", param="model")  # noqa: TRY301 - as any other fault of it
        with _quiet_peft():
            found: PeftConfig = PeftConfig.from_pretrained(str(folder))
            return found
    except Exception as error:  # noqa: BLE001 - odd files raise anything in peft
        blame(error, str(file), failed, param="model", is_offline=True)


def _unlike_adapter(config: object) -> str | None:
    """Why no adapter has such a config; None if one may have it."""
    if not isinstance(config, dict):
        return "it holds no JSON object"
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        return "its base_model_name_or_path is no text"
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return f"its peft_type is {kind!r}"
    return None


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Add a new adapter to ``model``, which is frozen.

    Raises:
        TrainingError: The adapter names modules that the model lacks, or by an invalid pattern.
    """
    try:
        with _quiet_peft():
            own = copy.deepcopy(config)  # peft changes the config
            own.task_type = "CAUSAL_LM"
            return get_peft_model(model, own)
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        why = error if isinstance(error, ValueError | re.error) else first_line(error)
        raise TrainingError(
            f"the adapter does not fit the model: {why}", param="method.dar.peft.target_modules"
        ) from error


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft 0.19 reads a property that transformers 5.23 is renaming
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        # such an adapter is refused: see `adapters.check_names`
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        yield


def lora_config(spec: LoraSpec) -> LoraConfig:
    """The adapter of a job spec, as peft's config."""
    return LoraConfig(
        r=spec.r,
        lora_alpha=cast("int", spec.lora_alpha),  # peft divides by r, so a float will do
        lora_dropout=spec.lora_dropout,
        target_modules=spec.target_modules,
        task_type="CAUSAL_LM",
    )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, as log-probabilities are compared between passes.

    The jitter of a router of experts is noise of training passes as well.
    """
    for path, module in model.named_modules():
        if "lora_dropout" in path:
            continue  # an adapter's own dropout acts in training passes only
        for name, value in list(vars(module).items()):
            is_probability = name == "p" and isinstance(module, nn.Dropout)
            if isinstance(value, float) and (is_probability or "drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def check_forward(model: LanguageModel, *, param: str = "model") -> None:
    """Reject an architecture that takes no positions from 0 up, or cannot leave out logits.

    Raises:
        TrainingError: It does not take both.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    missing = {"position_ids", "logits_to_keep"} - inspect.signature(base.forward).parameters.keys()
    if missing:
        raise TrainingError(
            f"{type(base).__name__} takes no {' and no '.join(sorted(missing))}, without which "
            "padded sequences have wrong log-probabilities; use a decoder-only model of another "
            "architecture",
            param=param,
        )
    if reserved := _reserved_positions(base):
        raise TrainingError(
            f"{type(base).__name__} counts positions from {reserved} up, so its log-probabilities "
            "would be wrong; use a decoder-only model of another architecture",
            param=param,
        )


def _reserved_positions(model: nn.Module) -> int:
    """Positions that no token gets: RoBERTa and its relatives count from behind their padding."""
    return max(
        (
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ),
        default=0,
    )


def check_trainable(model: LanguageModel) -> None:
    """Reject a model without a weight that training would change.

    Raises:
        InvalidRequestError: All are frozen, or those that are not are float16.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        probes.check_number_formats(model)
        return
    if isinstance(model, PeftModel):
        what, advice = "adapter", "load it with PeftModel.from_pretrained(…, is_trainable=True)"
    else:
        what, advice = "model", "call model.requires_grad_(True), or give a peft_config"
    raise InvalidRequestError(
        f"every weight of the {what} is frozen, so nothing would be trained; {advice}",
        param="model",
    )


@contextlib.contextmanager
def unchanged_cache_option(model: LanguageModel) -> Iterator[None]:
    """Undo a change of ``use_cache`` in the model's config.

    `transformers.Trainer` turns the cache off when it is created, and every checkpoint would
    contain that. The config of a model with several parts has no such option: its text config has.
    """
    config: Any = model.config
    missing = object()
    before = getattr(config, "use_cache", missing)
    try:
        yield
    finally:
        if before is not missing:
            config.use_cache = before
        elif hasattr(config, "use_cache"):
            del config.use_cache


def context_length(model: LanguageModel) -> int | None:
    """Longest sequence of the model in tokens; None if its config does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) - _reserved_positions(model) if length else None


def longest_sequence(models: Iterable[LanguageModel]) -> int:
    """Most tokens of a sequence that each of these models can read; see also `steady_length`."""
    limits = [length for one in models for length in (context_length(one), steady_length(one))]
    return min((length for length in limits if length), default=sys.maxsize)


def steady_length(model: LanguageModel) -> int | None:
    """Longest sequence for which RoPE is that of every shorter one; None if it never changes."""
    return model_configs.steady_length(model.config.get_text_config().to_dict())


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Reject a tokenizer whose BOS or EOS token the model lacks; its padding token is never read.

    Raises:
        TrainingError: The model lacks one.
    """
    for name in ("bos_token", "eos_token"):
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id >= vocabulary:
            raise TrainingError(
                f"the tokenizer's {name} {getattr(tokenizer, name)!r} has id {token_id}, but the "
                f"model has tokens 0 to {vocabulary - 1} only; use the model's own tokenizer, or "
                "resize the model's embeddings",
                param="model",
            )


def eos_ids(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a completion, of the model's configs and the tokenizer.

    Raises:
        TrainingError: One is no token id.
    """
    found: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        model.config.get_text_config().eos_token_id,
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(_as_list(value))
    return frozenset(found)


def complete_generation_config(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Add the tokens of `eos_ids` that the generation config lacks, so that they are saved.

    transformers reads only this config when it generates, and sets the other one's to the
    tokenizer's when training begins.

    Returns:
        Whether some were missing.
    """
    config = model.generation_config
    if config is None:
        return False
    present = _as_list(config.eos_token_id)
    missing = sorted(eos_ids(model, tokenizer) - set(present))
    if missing:
        ids = [*present, *missing]
        config.eos_token_id = ids if len(ids) > 1 else ids[0]
    return bool(missing)


def _as_list(ids: object) -> list[int]:
    found: list[Any] = list(ids) if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(one) is int for one in found):
        raise TrainingError(
            f"the model's config or generation config has the eos_token_id {ids!r}, but must have "
            "the id of a token, or a list of such ids",
            param="model",
        )
    return found


def weights_sketch(model: nn.Module) -> str:
    """SHA-256 of names, shapes and leading values of a model's parameters."""
    sketch = hashlib.sha256()
    for name, parameter in model.named_parameters():
        leading = parameter.detach().flatten()[:SKETCHED_VALUES].to("cpu", torch.float32)
        sketch.update(f"{name} {tuple(parameter.shape)} ".encode())
        sketch.update(leading.numpy().tobytes())
    return sketch.hexdigest()


def weights_bytes(module: nn.Module | None) -> int:
    """Bytes of a module's weights; 0 for None."""
    return 0 if module is None else sum(p.numel() * p.element_size() for p in module.parameters())
