"""Sampling completions from the policy, with the exact log-probability of what was drawn.

The sampler has its own loop instead of ``generate``. Prompts are read once, and their key-value
cache is then repeated for the K completions of each. Finished rows leave the batch. Positions and
masks come from lengths. Every token uses one uniform number, a function of (seed, step, row, token
position), which the inverse of the cumulative distribution turns into a token. So a completion
depends neither on its neighbours in the batch nor on how the batch was cut, up to rounding: other
shapes may change the last digits of the logits, and in bfloat16 occasionally a token.

The distribution that is sampled, in this order: padding and what the tokenizer has no token for are
impossible, unless they end completions; the repetition penalty acts on the raw logits; then
temperature, top-k, top-p, min-p, as in transformers. The behavior log-probability is taken after
all of these, or, with ``behavior="policy"``, it is the policy's own before any of them. Arithmetic
is in float32, or in float64 where the model is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    DynamicCache,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.samples import FinishReason
from dar.training.config.config import DARConfig
from dar.training.data.codec import TextCodec
from dar.training.data.rows import DataCollatorForDAR, TokenPair
from dar.training.loss import precise
from dar.training.model.loading import LanguageModel
from dar.training.model.logprobs import autocast

Warper = Callable[[Any, Any], Any]
"""A filter of transformers: takes token ids and scores, returns scores."""

MAX_ROWS = 512
"""Most completions that are decoded at once."""
MAX_CACHED_TOKENS = 2**19
"""Most positions of the key-value cache at once."""
NOISE_BLOCK = 64
"""Tokens for which noise is drawn at once."""
LARGEST_UNIFORM = 1 - 2**-40
"""Keeps the product of a uniform number and the total mass below the total mass."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled completion of a prompt."""

    ids: list[int]
    """Tokens, the end-of-sequence token included where there is one."""
    logp: float
    """Log-probability of the whole completion, in nats: under the distribution that was sampled, or
    with ``behavior="policy"`` under the policy at temperature 1 without filters."""
    finish_reason: FinishReason


OnGroup = Callable[[int, list[Completion]], None]
"""Called with the number of a prompt within the step and its K completions, once all have ended."""


class FinishedCompletions:
    """Completions that have ended, by row; reports each prompt whose completions have all ended.

    Args:
        k: Completions of a prompt.
        on_group: Called for each such prompt.
    """

    def __init__(self, k: int, on_group: OnGroup) -> None:
        self.rows: dict[int, Completion] = {}
        self._k = k
        self._on_group = on_group

    def add(self, row: int, completion: Completion) -> None:
        self.rows[row] = completion
        number = row // self._k
        rows = range(number * self._k, (number + 1) * self._k)
        if all(row in self.rows for row in rows):
            self._on_group(number, [self.rows[row] for row in rows])


@dataclass(slots=True)
class _Batch:
    """Rows that are still being decoded; tensors are on the model's device."""

    rows: list[int]
    """Number of each row in the whole step."""
    written: list[list[int]]
    """Tokens of each row so far."""
    budgets: list[int]
    """Longest completion of each row."""
    cache: DynamicCache
    attention_BT: Tensor
    positions_B: Tensor
    seen_BV: Tensor | None
    """Tokens that occurred already; only under a repetition penalty."""
    logp_sums_B: Tensor

    def keep(self, rows: list[int]) -> None:
        """Keep the rows at these positions of the batch, drop all others."""
        index = torch.tensor(rows, device=self.positions_B.device)
        self.rows = [self.rows[i] for i in rows]
        self.written = [self.written[i] for i in rows]
        self.budgets = [self.budgets[i] for i in rows]
        self.cache.batch_select_indices(index)
        self.attention_BT = self.attention_BT[index]
        self.positions_B = self.positions_B[index]
        self.seen_BV = None if self.seen_BV is None else self.seen_BV[index]
        self.logp_sums_B = self.logp_sums_B[index]


def uniforms(seed: int, step: int, rows: Sequence[int], block: int) -> Tensor:
    """Noise of `NOISE_BLOCK` consecutive tokens for each row, from a counter-based generator.

    Args:
        seed: The job's.
        step: Optimizer step, from 1.
        rows: Numbers of B rows in the whole step.
        block: Number of the block of tokens, from 0.

    Returns:
        ``[B, NOISE_BLOCK]`` float64 in [0, 1).
    """
    drawn = [
        np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, block, row])).random(
            NOISE_BLOCK
        )
        for row in rows
    ]
    return torch.from_numpy(np.stack(drawn)).clamp(max=LARGEST_UNIFORM)


def check_tokens(texts: Sequence[Sequence[int]], vocabulary: int, what: str = "a prompt") -> None:
    """Reject a text with a token that the model has no embedding for.

    Args:
        texts: Token ids of prompts or completions.
        vocabulary: Tokens below this have an embedding.
        what: What one of ``texts`` is, for the error.

    Raises:
        InvalidRequestError: A token is not below ``vocabulary``.
    """
    largest = max((max(ids) for ids in texts), default=0)
    if largest >= vocabulary:
        raise InvalidRequestError(
            f"{what} has token {largest}, but the model has tokens 0 to {vocabulary - 1} only: "
            "the tokenizer is not the model's, or was extended without it; use the model's "
            "tokenizer, or resize the model's embeddings",
            param="model",
        )


def draw(scores_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse of the cumulative distribution.

    Args:
        scores_BV: Unnormalised log-probabilities; -inf is impossible.
        uniforms_B: float64 in [0, 1).

    Returns:
        Tokens ``[B]`` and their log-probabilities ``[B]``, float32 or, for float64 scores, float64.
    """
    logps_BV = torch.log_softmax(precise(scores_BV), dim=-1)
    masses_BV = logps_BV.exp().double().cumsum(dim=-1)
    targets_B1 = (uniforms_B * masses_BV[:, -1]).unsqueeze(1)
    tokens_B1 = torch.searchsorted(masses_BV, targets_B1, right=True).clamp(
        max=scores_BV.shape[1] - 1
    )
    return tokens_B1.squeeze(1), logps_BV.gather(1, tokens_B1).squeeze(1)


class Sampler:
    """Samples K completions of each prompt.

    Args:
        config: Lengths and the options of sampling.
        tokenizer: Decodes completions, to find stop strings. Tokens that it lacks are not sampled.
        eos_ids: Tokens that end a completion.
        max_length: Longest prompt with completion, in tokens.
    """

    def __init__(
        self,
        config: DARConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_ids: frozenset[int],
        max_length: int,
    ) -> None:
        self._config = config
        self.codec = TextCodec(tokenizer)
        self._eos_ids = eos_ids
        self._max_length = max_length
        ends = set(eos_ids)
        if any(str(tokenizer.pad_token) in stop for stop in config.stop):
            ends.add(tokenizer.pad_token_id)
        self._possible = (self.codec.known_ids - {tokenizer.pad_token_id}) | ends
        self._impossible_V: Tensor | None = None
        self._collate = DataCollatorForDAR()
        self._warpers: list[Warper] = []
        if config.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.top_k:
            self._warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self._warpers.append(TopPLogitsWarper(config.top_p))
        if config.min_p:
            self._warpers.append(MinPLogitsWarper(config.min_p))
        # A token may be a part of a character, but at least one byte; a character has at most 4.
        self._stop_window = 4 * max(map(len, config.stop), default=0) + 8

    @torch.no_grad()
    def check(self, model: LanguageModel) -> None:
        """Reject a model whose key-value cache cannot be repeated and cut row by row.

        Raises:
            TrainingError: The model has no such cache; most such models have recurrent layers.
        """
        model.eval()
        try:
            with autocast(next(model.parameters()).device, self._config.half):
                batch, logits_BV = self._prefill(model, [[0], [0, 0]], range(2))
                batch.keep([0, len(batch.rows) - 1])
                self._read(model, batch, logits_BV[:2].argmax(dim=-1), width=3)
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            raise TrainingError(
                f"this trainer cannot sample from {type(base).__name__} ({error}): its cache does "
                "not hold one row per completion; use a model with attention layers only",
                param="model",
            ) from error

    @torch.no_grad()
    def sample(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        step: int,
        numbers: Sequence[int] | None = None,
        before_each: Callable[[], None] = lambda: None,
        on_group: OnGroup = lambda _number, _completions: None,
    ) -> list[Completion]:
        """Sample for prompts of a step, all or some of them.

        Args:
            model: The policy; it is left in evaluation mode.
            prompts: Token ids of P prompts; P may be 0.
            step: Optimizer step, from 1, or 0 in an evaluation. The noise is a function of it, the
                config's seed and the numbers of prompt and completion.
            numbers: Number of each prompt within the step, ascending; default: from 0.
            before_each: Called every few tokens; may raise to stop.
            on_group: Called between two tokens for every prompt whose completions have all ended;
                may raise to stop.

        Returns:
            P * K completions, those of a prompt side by side.

        Raises:
            InvalidRequestError: A prompt has a token that the model does not know.
            TrainingError: The policy returned a probability that is not a number.
        """
        check_tokens(prompts, int(model.config.get_text_config().vocab_size))
        model.eval()
        if numbers is None:
            numbers = range(len(prompts))
        done = FinishedCompletions(self._config.dar_k, on_group)
        # One autocast context around the whole loop: within it, each weight is cast only once.
        with autocast(next(model.parameters()).device, self._config.half):
            for part, own in self._parts(prompts, numbers):
                self._decode(self._prefill(model, part, own), model, step, before_each, done)
        return [done.rows[row] for row in sorted(done.rows)]

    def _parts(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> Iterator[tuple[Sequence[Sequence[int]], Sequence[int]]]:
        longest = max(map(len, prompts), default=0) + self._config.max_new_tokens
        rows = max(1, min(MAX_ROWS, MAX_CACHED_TOKENS // longest))
        count = max(1, rows // self._config.dar_k)
        for first in range(0, len(prompts), count):
            yield prompts[first : first + count], numbers[first : first + count]

    def _prefill(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> tuple[_Batch, Tensor]:
        """Read the prompts once, and repeat their cache for the K completions of each."""
        k, device = self._config.dar_k, next(model.parameters()).device
        inputs = self._collate([TokenPair(ids, ()) for ids in prompts])
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        cache = DynamicCache(config=model.config)
        logits_PV = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_repeat_interleave(k)
        budgets = [
            min(self._config.max_new_tokens, self._max_length - len(ids))
            for ids in prompts
            for _ in range(k)
        ]
        attention_BT = inputs["attention_mask"].repeat_interleave(k, dim=0)
        ones_BT = attention_BT.new_ones(len(budgets), max(budgets))
        seen_BV = None
        if self._config.repetition_penalty != 1:
            seen_PV = torch.zeros_like(logits_PV, dtype=torch.int8)
            seen_PV.scatter_reduce_(
                1, inputs["input_ids"], inputs["attention_mask"].to(torch.int8), "amax"
            )
            seen_BV = seen_PV.bool().repeat_interleave(k, dim=0)
        rows = [number * k + i for number in numbers for i in range(k)]
        batch = _Batch(
            rows=rows,
            written=[[] for _ in rows],
            budgets=budgets,
            cache=cache,
            attention_BT=torch.cat([attention_BT, ones_BT], dim=1),
            positions_B=attention_BT.sum(dim=1),
            seen_BV=seen_BV,
            logp_sums_B=torch.zeros(len(rows), device=device, dtype=precise(logits_PV).dtype),
        )
        return batch, logits_PV.repeat_interleave(k, dim=0)

    def _decode(
        self,
        start: tuple[_Batch, Tensor],
        model: LanguageModel,
        step: int,
        before_each: Callable[[], None],
        done: FinishedCompletions,
    ) -> None:
        batch, logits_BV = start
        prompt_width = batch.cache.get_seq_length()
        noise_BN = torch.empty(0)
        for position in range(max(batch.budgets)):
            offset = position % NOISE_BLOCK
            if offset == 0:
                noise_BN = uniforms(
                    self._config.seed, step, batch.rows, position // NOISE_BLOCK
                ).to(logits_BV.device)
            if position % 16 == 0:
                before_each()
            tokens_B, logps_B = draw(self._scores(logits_BV, batch.seen_BV), noise_BN[:, offset])
            if self._config.behavior == "policy":
                policy_BV = precise(logits_BV).log_softmax(dim=-1)
                logps_B = policy_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
            batch.logp_sums_B += logps_B
            if batch.seen_BV is not None:
                batch.seen_BV.scatter_(1, tokens_B.unsqueeze(1), value=True)
            kept = self._finish(batch, tokens_B.tolist(), step, done)
            if not kept:
                return
            if len(kept) < len(batch.rows):
                batch.keep(kept)
                index = torch.tensor(kept, device=tokens_B.device)
                tokens_B, noise_BN = tokens_B[index], noise_BN[index]
            logits_BV = self._read(model, batch, tokens_B, width=prompt_width + position + 1)

    def _read(self, model: LanguageModel, batch: _Batch, tokens_B: Tensor, *, width: int) -> Tensor:
        """Logits ``[B, V]`` after one more token of each row, with ``width`` columns written."""
        logits_BV: Tensor = model(
            input_ids=tokens_B.unsqueeze(1),
            attention_mask=batch.attention_BT[:, :width],
            position_ids=batch.positions_B.unsqueeze(1),
            past_key_values=batch.cache,
            use_cache=True,
        ).logits[:, -1]
        batch.positions_B = batch.positions_B + 1
        return logits_BV

    def _scores(self, logits_BV: Tensor, seen_BV: Tensor | None) -> Tensor:
        scores_BV = precise(logits_BV)
        scores_BV = scores_BV.masked_fill(self._impossible(scores_BV), -torch.inf)
        if seen_BV is not None:
            # transformers' own processor reads the padded prompt, so it would penalise the padding
            # token, which in many models is the end-of-sequence token.
            penalty = self._config.repetition_penalty
            penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
            scores_BV = torch.where(seen_BV, penalised_BV, scores_BV)
        for warper in self._warpers:
            scores_BV = warper(scores_BV, scores_BV)  # none of them reads its first argument
        return scores_BV

    def _impossible(self, scores_BV: Tensor) -> Tensor:
        """``[V]``, true for tokens that are never sampled."""
        count = scores_BV.shape[1]
        if self._impossible_V is None or len(self._impossible_V) != count:
            self._impossible_V = torch.tensor([i not in self._possible for i in range(count)])
        self._impossible_V = self._impossible_V.to(scores_BV.device)
        return self._impossible_V

    def _finish(
        self, batch: _Batch, tokens: list[int], step: int, done: FinishedCompletions
    ) -> list[int]:
        """Append one token per row; returns the positions of the rows that continue."""
        ended: list[tuple[int, FinishReason]] = []
        kept: list[int] = []
        for place, (token, written) in enumerate(zip(tokens, batch.written, strict=True)):
            written.append(token)
            tail = written[-self._stop_window :]
            if token in self._eos_ids or self.codec.contains(tail, self._config.stop):
                ended.append((place, "stop"))
            elif len(written) == batch.budgets[place]:
                ended.append((place, "length"))
            else:
                kept.append(place)
        if ended:
            sums = batch.logp_sums_B.tolist()
            for place, reason in ended:
                if not np.isfinite(sums[place]):
                    raise _not_numbers(step)
                done.add(batch.rows[place], Completion(batch.written[place], sums[place], reason))
        return kept


def _not_numbers(step: int) -> TrainingError:
    """The error of a policy whose probabilities are NaN; in step 1 training is not the cause."""
    problem = "the policy returns probabilities that are not numbers, so nothing can be sampled"
    advice = (
        "no step has changed a weight yet, so look at the weights of the model, at the options of "
        "its adapter, and at the number format of the passes (bf16, fp16)"
        if step == 1
        else "lower learning_rate or max_grad_norm, or raise beta"
    )
    return TrainingError(f"{problem}; {advice}")
