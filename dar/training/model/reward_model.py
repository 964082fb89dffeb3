"""Reward models: a sequence classifier with one label, on this machine, as a reward source.

A reward depends mostly on the completion, so a text that is too long is cut at its beginning. Rows
are padded on the right with a token that none of them contains, so that a reward does not depend on
the other rows of the batch.
"""

import asyncio
import functools
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dar.errors import InvalidRequestError, RewardMisconfiguredError
from dar.protocol.rows import Message
from dar.rewards.base import Failed, RewardContext, RewardResult, RewardSample
from dar.rewards.functions import as_results
from dar.rewards.threads import in_daemon_thread
from dar.training.data.chat import rendered_chat
from dar.training.data.rows import without_early_turns
from dar.training.loss import precise
from dar.training.model import loading, probes
from dar.training.model.loading import weights_bytes, weights_sketch
from dar.training.model.vocabulary import check_classifier

RewardModels = str | Path | PreTrainedModel | Sequence[str | Path | PreTrainedModel]
"""Folder or hub id of a sequence classifier with one label, or such a model, or several of
these."""

MAX_ROWS = 64
"""Most sequences in one forward pass."""
MAX_TOKENS = 16_384
"""Most positions in one forward pass, padding included."""


class RewardModel:
    """Scores completions with a sequence classifier of one label.

    A plain prompt and its completion are encoded as one text, with the special tokens of every text
    and, if the completion has ended, the EOS token. A conversation is rendered by the chat template
    of the reward model's own tokenizer.

    Args:
        model: A model of `transformers.AutoModelForSequenceClassification`; it is frozen and put
            into evaluation mode.
        tokenizer: Its own; default: the one beside the model.
        name: Component name.
        max_length: Longest text in tokens; default: the limit of model and tokenizer.
        is_offline: Whether access to the hub is forbidden.
        token: Token of the hub; default: that of this machine's user.

    Raises:
        InvalidRequestError: The model does not have exactly one label, or lacks tokens of its
            tokenizer.
        TrainingError: There is no tokenizer, or a weight is NaN or infinite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "reward_model",
        max_length: int | None = None,
        variables: Mapping[str, Any] | None = None,
        is_offline: bool = False,
        token: str | None = None,
    ) -> None:
        if model.config.num_labels != 1:
            raise InvalidRequestError(
                f"the reward model {_named(model)} gives {model.config.num_labels} numbers per "
                "text, but a reward is one: use a sequence classifier with num_labels=1",
                param="reward_model",
            )
        loading.settle_outputs(model)
        probes.check_finite(model, f"the reward model {_named(model)}", param="reward_model")
        self._model = model.requires_grad_(requires_grad=False).eval()
        self._tokenizer = tokenizer or _tokenizer(model, is_offline=is_offline, token=token)
        self._embeddings = check_classifier(model, self._tokenizer, _named(model))
        self._name = name
        self._max_length = max_length or _longest(model, self._tokenizer)
        self._variables = dict(variables or {})
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if takes_cache else {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def takes_whole_steps(self) -> bool:
        """Always: forward passes over many texts of similar length cost less."""
        return True

    @property
    def size_bytes(self) -> int:
        """Memory of the weights."""
        return weights_bytes(self._model)

    def sketch(self) -> str:
        """Digest of the weights."""
        return weights_sketch(self._model)

    def to(self, device: torch.device) -> "RewardModel":
        self._model.to(device)
        return self

    async def score(
        self,
        samples: Sequence[RewardSample],
        context: RewardContext,  # noqa: ARG002 - part of the RewardSource interface
    ) -> list[RewardResult]:
        """Score ``samples``: one result each, in order. A reward that is not finite is a failure.

        Raises:
            RewardMisconfiguredError: The tokenizer's chat template rejects a conversation.
        """
        is_stopped = threading.Event()
        try:
            return await in_daemon_thread(lambda: self._score(samples, is_stopped))
        except asyncio.CancelledError:
            is_stopped.set()  # a thread cannot be killed; this one ends after its forward pass
            raise

    async def aclose(self) -> None:
        pass

    @torch.no_grad()
    def _score(
        self, samples: Sequence[RewardSample], is_stopped: threading.Event
    ) -> list[RewardResult]:
        rows = [self.encode(sample) for sample in samples]
        rewards: dict[int, float] = {}
        for places in _batches(rows, loading.steady_length(self._model)):
            if is_stopped.is_set():
                break
            scores_B = self._forward([rows[place] for place in places])
            rewards.update(zip(places, scores_B.tolist(), strict=True))
        empty = Failed(
            "no_tokens", "the completion has no token for the reward model", is_transient=False
        )
        source = f"reward model {self._name}"
        return [
            as_results([rewards[place]], 1, source)[0] if place in rewards else empty
            for place in range(len(samples))
        ]

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rewards ``[B]``, float32 or finer.

        A classifier on top of a decoder reads the last token that is not ``pad_token_id`` of its
        configuration. If the configuration has none, a token that no row contains takes its place.
        """
        config = self._model.config.get_text_config()
        configured = config.pad_token_id
        pad = _unused(rows, int(config.vocab_size)) if configured is None else configured
        if pad is None and len(rows) > 1:
            return torch.cat([self._forward([row]) for row in rows])
        width = max(map(len, rows))
        ids_BT = torch.tensor([[*row, *[pad or 0] * (width - len(row))] for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = next(self._model.parameters()).device
        try:
            config.pad_token_id = pad
            logits_B1 = self._model(
                input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), **self._options
            ).logits
        finally:
            config.pad_token_id = configured
        rewards_B: Tensor = logits_B1[:, 0]
        return precise(rewards_B).cpu()

    # --- texts as token ids ------------------------------------------------------------------

    def encode(self, sample: RewardSample) -> list[int]:
        """The model's tokens of a sample, at most its longest text.

        Raises:
            RewardMisconfiguredError: The tokenizer's chat template rejects the conversation, or
                there is none; or the model lacks a token of the text.
        """
        if sample.messages is None:
            ids = self._text(sample)
        else:
            ids = self._conversation(sample.messages, sample.completion)
        if max(ids, default=0) >= self._embeddings:
            raise RewardMisconfiguredError(
                f"the reward model {_named(self._model)} has tokens 0 to {self._embeddings - 1} "
                f"only, but its tokenizer has put token {max(ids)} into a text; use the reward "
                "model's own tokenizer, or resize its embeddings"
            )
        if len(ids) <= self._max_length:
            return ids
        starts = {self._tokenizer.bos_token_id, self._tokenizer.cls_token_id}
        head = ids[:1] if ids[0] in starts else []
        return [*head, *ids[len(ids) - self._max_length + len(head) :]]

    def _text(self, sample: RewardSample) -> list[int]:
        tokenizer = self._tokenizer
        text = f"{sample.prompt}{sample.completion}"
        has_bos_text = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
        ids: list[int] = tokenizer(text, add_special_tokens=not has_bos_text)["input_ids"]
        eos = tokenizer.eos_token_id
        is_open = eos is not None and ids[-1:] != [eos]
        return [*ids, eos] if is_open and sample.finish_reason == "stop" else ids

    def _conversation(self, prompt: Sequence[Mapping[str, Any]], completion: str) -> list[int]:
        if not self._tokenizer.chat_template:
            raise RewardMisconfiguredError(
                "the prompts are conversations, but the tokenizer of the reward model "
                f"{_named(self._model)} has no chat template; use plain prompts, a reward model "
                "for conversations, or give reward_processing_class"
            )
        whole = _answered(prompt, completion)
        for messages in (whole, *without_early_turns(whole)):
            ids = self._rendered(messages)
            if len(ids) <= self._max_length:
                break
        return ids

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        whose = f"the reward model {_named(self._model)}"
        try:
            rendered_chat(self._tokenizer, messages, self._variables, whose=whose)
        except InvalidRequestError as error:
            raise RewardMisconfiguredError(error.message) from error
        encoded: Any = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            return_dict=True,
            **self._variables,
        )
        return list(encoded["input_ids"])


def load_reward_model(
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    component: str = "reward_model",
    dtype: torch.dtype | str = "auto",
    variables: Mapping[str, Any] | None = None,
    is_offline: bool = False,
    token: str | None = None,
) -> RewardModel:
    """Load a reward model from safetensors; built-in architectures only.

    Args:
        name: Folder or hub id.
        tokenizer: Its own; default: the one beside it.
        component: Component name of its rewards.
        dtype: Number format of the weights; ``auto``: as they were saved.
        variables: Variables of its chat template.
        is_offline: Whether access to the hub is forbidden.
        token: Token of the hub; default: that of this machine's user.

    Raises:
        TrainingError: There is no such model, it needs code of its own, or it is not a sequence
            classifier.
        InvalidRequestError: It does not have exactly one label.
        HubUnreachableError: The hub cannot be reached.
    """
    path = str(name)
    load = functools.partial(
        AutoModelForSequenceClassification.from_pretrained, dtype=dtype, output_loading_info=True
    )
    model, report = loading.from_safetensors(
        load,
        path,
        "a sequence classifier",
        param="reward_model",
        is_offline=is_offline,
        token=token,
    )
    loading.check_weights(
        report, path, "reward model", param="reward_model", optional=loading.OPTIONAL_HEADS
    )
    return RewardModel(
        model,
        tokenizer,
        name=component,
        variables=variables,
        is_offline=is_offline,
        token=token,
    )


def make_reward_models(
    given: RewardModels | None,
    tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
    *,
    device: torch.device,
    is_offline: bool,
    token: str | None = None,
    names: Sequence[str] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[RewardModel]:
    """All reward models of a run, on ``device``; see `dar.DARTrainer` for the arguments.

    Their components have ``names``; default: `component_name`. Their chat templates get
    ``variables``.

    Raises:
        InvalidRequestError: The number of tokenizers is wrong, or a model does not have exactly one
            label.
        TrainingError: A model cannot be loaded.
    """
    models = as_list(given)
    own: list[PreTrainedTokenizerBase | None]
    if tokenizers is None or isinstance(tokenizers, PreTrainedTokenizerBase):
        own = [tokenizers] * (len(models) if tokenizers is None else 1)
    else:
        own = list(tokenizers)
    if len(own) != len(models):
        raise InvalidRequestError(
            f"{len(own)} tokenizers (reward_processing_class) for {len(models)} reward models; "
            "give one each, or None for the one beside the model",
            param="reward_processing_class",
        )
    made = []
    for number, (model, tokenizer) in enumerate(zip(models, own, strict=True), start=1):
        name = component_name(number) if names is None else names[number - 1]
        if isinstance(model, PreTrainedModel):
            source = RewardModel(
                model, tokenizer, name=name, variables=variables, is_offline=is_offline, token=token
            )
        else:
            source = load_reward_model(
                model,
                tokenizer,
                component=name,
                variables=variables,
                is_offline=is_offline,
                token=token,
            )
        made.append(source.to(device))
    return made


def as_list(given: RewardModels | None) -> list[str | Path | PreTrainedModel]:
    """One reward model, several or none as a list."""
    if given is None:
        return []
    return [given] if isinstance(given, str | Path | PreTrainedModel) else list(given)


def component_name(number: int) -> str:
    """Component name of the ``number``-th reward model, from 1."""
    return "reward_model" if number == 1 else f"reward_model_{number}"


def _tokenizer(
    model: PreTrainedModel, *, is_offline: bool, token: str | None
) -> PreTrainedTokenizerBase:
    if not model.name_or_path:
        raise InvalidRequestError(
            "the reward model was given as a model without a folder or hub id, so there is no "
            "tokenizer beside it; give reward_processing_class",
            param="reward_processing_class",
        )
    return loading.load_tokenizer(model.name_or_path, is_offline=is_offline, token=token)


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest text for model and tokenizer; a tokenizer without a limit has a huge number."""
    return min(
        loading.context_length(model) or tokenizer.model_max_length, tokenizer.model_max_length
    )


def _named(model: PreTrainedModel) -> str:
    return repr(model.name_or_path or type(model).__name__)


def _batches(rows: Sequence[Sequence[int]], steady: int | None) -> Iterator[list[int]]:
    """Numbers of the rows of each forward pass, long rows first to save padding; no empty rows.

    Rows beyond ``steady`` tokens are not beside others, for which RoPE would be theirs.
    """
    batch: list[int] = []
    filled = [place for place, row in enumerate(rows) if row]
    for place in sorted(filled, key=lambda i: (-len(rows[i]), i)):
        widest = len(rows[batch[0]]) if batch else 0
        if batch and (
            len(batch) == MAX_ROWS
            or (len(batch) + 1) * widest > MAX_TOKENS
            or (steady is not None and len(rows[place]) <= steady < widest)
        ):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _unused(rows: Sequence[Sequence[int]], vocabulary: int) -> int | None:
    """A token that no row contains, if there is one."""
    used = {token for row in rows for token in row}
    return next((token for token in range(vocabulary) if token not in used), None)


def _answered(prompt: Sequence[Message], completion: str) -> Sequence[Message]:
    """The conversation with its completion. A last message of the assistant is continued."""
    last = prompt[-1]
    if last["role"] == "assistant" and isinstance(last.get("content"), str):
        return [*prompt[:-1], {**last, "content": last["content"] + completion}]
    return [*prompt, {"role": "assistant", "content": completion}]
