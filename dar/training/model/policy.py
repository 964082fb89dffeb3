"""`Policy`: the trained model, its reference and its tokenizer."""

import copy
from dataclasses import dataclass

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.training.config.config import DARConfig
from dar.training.model import adapters, loading, probes
from dar.training.model.vocabulary import check_reference, embeddings_of


@dataclass(frozen=True, slots=True)
class Policy:
    """The trained model, its frozen reference and its tokenizer."""

    model: loading.LanguageModel
    reference: nn.Module | None
    """None if the reference is the policy without its adapter, or there is none (alpha = 0)."""
    tokenizer: PreTrainedTokenizerBase
    base_sketch: str
    """Digest of the weights that training starts from, and of the reference."""
    has_new_ends: bool
    """Whether the generation config had to learn tokens that end a completion."""
    is_resized: bool
    """Whether an adapter is published with the token embeddings, as its base has fewer or more."""
    readable: int
    """The model and its reference have embeddings for the tokens below this."""

    @classmethod
    def make(
        cls,
        model: str | loading.LanguageModel,
        config: DARConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        ref_model: PreTrainedModel | None,
        peft_config: PeftConfig | None,
        base_name: str | None,
        is_offline: bool,
    ) -> "Policy":
        """Load what is missing, add the adapter, freeze the reference; see `dar.DARTrainer`.

        Raises:
            InvalidRequestError: ``model`` has an adapter already and would get another, or the
                reference would have no effect, be trained, or not read every token.
            TrainingError: A model or tokenizer cannot be loaded, or a model is not causal.
        """
        if ref_model is not None and config.alpha == 0:
            raise InvalidRequestError(
                "ref_model has no effect with alpha=0, which takes no reference; leave it out",
                param="ref_model",
            )
        if peft_config is not None:
            adapters.check_adapter(peft_config)
        if not isinstance(model, str):
            adapters.check_policy(model)
        source = model if isinstance(model, str) else str(model.name_or_path)
        tokenizer = tokenizer or _tokenizer_beside(
            source, is_offline=is_offline, token=config.hub_token
        )
        policy = (
            loading.load_model(model, is_offline=is_offline, token=config.hub_token)
            if isinstance(model, str)
            else model
        )
        _check_model(policy, f"the model {source!r}" if source else "the model", param="model")
        if ref_model is not None:
            _check_model(ref_model, "the reference model", param="ref_model")
        loading.check_special_tokens(tokenizer, int(policy.config.get_text_config().vocab_size))
        has_new_ends = loading.complete_generation_config(policy, tokenizer)
        loading.disable_dropout(policy)
        loading.make_savable(policy)
        probes.check_repeatable(policy)
        sketch = loading.weights_sketch(policy)
        reference: nn.Module | None = ref_model
        transformers.set_seed(config.seed)  # for the random weights of a new adapter
        if peft_config is not None:
            policy = _with_adapter(policy, peft_config)
        probes.check_dora(policy)
        is_resized = isinstance(policy, PeftModel) and adapters.is_resized(policy, source)
        if isinstance(policy, PeftModel):
            named = base_name or adapters.local_base(source) or None
            policy.active_peft_config.base_model_name_or_path = named
            policy.active_peft_config.task_type = "CAUSAL_LM"  # or peft could not load it again
        elif reference is None and config.alpha > 0:
            reference = copy.deepcopy(policy)
        if reference is not None:
            if ref_model is not None:
                check_reference(ref_model, policy, tokenizer)
            loading.disable_dropout(reference)
            reference = reference.requires_grad_(requires_grad=False).eval()
            sketch += loading.weights_sketch(reference)
        readable = min(embeddings_of(one) for one in (policy, ref_model) if one is not None)
        return cls(policy, reference, tokenizer, sketch, has_new_ends, is_resized, readable)

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def longest(self) -> int:
        """Most tokens of a prompt with its completion, for the model and its reference."""
        return loading.longest_sequence(self._readers())

    @property
    def steady_length(self) -> int | None:
        """Where RoPE of the model or of its reference changes; None: nowhere."""
        lengths = map(loading.steady_length, self._readers())
        return min((one for one in lengths if one is not None), default=None)

    def _readers(self) -> list[loading.LanguageModel]:
        if isinstance(self.reference, PreTrainedModel | PeftModel):
            return [self.model, self.reference]
        return [self.model]

    def place_reference(self, device: torch.device) -> None:
        """Move the reference to the policy's device."""
        if self.reference is not None:
            self.reference.to(device)


def _tokenizer_beside(
    source: str, *, is_offline: bool, token: str | None
) -> PreTrainedTokenizerBase:
    if not source:
        raise InvalidRequestError(
            "the model was given without a folder or hub id, so there is no tokenizer beside it; "
            "give its tokenizer as processing_class",
            param="processing_class",
        )
    return loading.load_tokenizer(source, is_offline=is_offline, token=token)


def _check_model(model: loading.LanguageModel, what: str, *, param: str) -> None:
    """Reject a model whose log-probabilities would be wrong.

    Args:
        model: The model or its reference; options of its outputs are set.
        what: Its name in the error.
        param: The parameter that names it.

    Raises:
        InvalidRequestError: Its weights are not in memory.
        TrainingError: It takes no positions, has weights that are not finite, or is not causal.
    """
    loading.settle_outputs(model)
    probes.check_in_memory(model, what, param=param)
    loading.check_forward(model, param=param)
    probes.check_finite(model, what, param=param)
    probes.check_causal(model, param=param)


def _with_adapter(policy: loading.LanguageModel, peft_config: PeftConfig) -> PeftModel:
    """Add a new adapter to ``policy``.

    Raises:
        InvalidRequestError: It has one already, or lacks the modules that the adapter names.
    """
    if isinstance(policy, PeftModel):
        raise InvalidRequestError(
            "the model has an adapter already; leave peft_config out to train that one, or merge "
            "it first"
        )
    adapters.check_places(policy, peft_config)
    return loading.add_adapter(policy, peft_config)
