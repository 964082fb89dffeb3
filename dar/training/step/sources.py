"""Where the scored completions of a step come from: sampled and scored now, or read from the data set."""

import sys
from collections.abc import Mapping

import torch

from dar.errors import InvalidRequestError
from dar.training.config.config import DARConfig
from dar.training.data.rows import PromptEncoder, Rows, naming_row
from dar.training.model import loading
from dar.training.model.policy import Policy
from dar.training.run_context import RunContext
from dar.training.sampling.prompts import EvaluationStream, PromptStream
from dar.training.sampling.sampler import Sampler, check_tokens
from dar.training.step.offline import ReplaySource, RowEncoder, check_replay
from dar.training.step.online import OnlineSource
from dar.training.step.passes import ForwardPasses
from dar.training.step.records import Mode, Weigher
from dar.training.step.reward_feed import Scoring

STREAMS: Mapping[Mode, type[PromptStream]] = {"train": PromptStream, "eval": EvaluationStream}


def make_source(
    run: RunContext,
    policy: Policy,
    passes: ForwardPasses,
    config: DARConfig,
    rows: Rows,
    *,
    scoring: Scoring | None,
    mode: Mode,
) -> OnlineSource | ReplaySource:
    """The step source of a data set.

    Args:
        run: The training run.
        policy: The model that is trained.
        passes: Measures completions.
        config: Of the run.
        rows: The data set.
        scoring: How completions are scored; None: ``rows`` hold completions and rewards.
        mode: In an evaluation, every step is all rows in their order.

    Raises:
        InvalidRequestError: A row cannot be used, or a prompt and ``max_new_tokens`` do not fit
            into the model's context.
        TrainingError: The model cannot be sampled from.
    """
    tokenizer = policy.tokenizer
    weigher = Weigher(
        config,
        passes.reference_logps if config.alpha > 0 else None,
        passes.policy_logps,
        dtype=torch.promote_types(policy.model.dtype, torch.float32),
    )
    context = loading.context_length(policy.model) or sys.maxsize
    longest = min(config.max_length or context, context)
    if scoring is None:
        row_encoder = _row_encoder(policy, config, longest)
        count = config.prompts_per_step if mode == "train" else len(rows)
        check_replay(rows, row_encoder, count)
        stream = _stream(run, mode, rows, row_encoder, config)
        return ReplaySource(stream, weigher, tokenizer=tokenizer, sink=run.sink, mode=mode)
    encoder = PromptEncoder(tokenizer, _longest_prompt(config, longest))
    stream = _stream(run, mode, rows, encoder, config)
    if max(tokenizer.get_vocab().values()) >= policy.vocabulary:
        _check_tokens(rows, encoder, policy.vocabulary)
    sampler = _sampler(policy, config, longest)
    return OnlineSource(run, policy, stream, sampler, scoring, weigher, mode=mode)


def _stream(
    run: RunContext, mode: Mode, rows: Rows, encoder: PromptEncoder, config: DARConfig
) -> PromptStream:
    stream = STREAMS[mode](rows, encoder, config, run.sink)
    run.ranks.from_main(stream.try_rows)
    return stream


def _row_encoder(policy: Policy, config: DARConfig, longest: int) -> RowEncoder:
    return RowEncoder(
        policy.tokenizer,
        config.max_prompt_length,
        longest=longest,
        vocabulary=policy.vocabulary,
        eos_ids=loading.eos_ids(policy.model, policy.tokenizer),
    )


def _longest_prompt(config: DARConfig, longest: int) -> int:
    length = config.max_prompt_length or longest
    if length >= longest:  # the bound has no effect
        length = longest - config.max_new_tokens
    if length <= 0:
        raise InvalidRequestError(
            f"a prompt and {config.max_new_tokens} new tokens do not fit into {longest} tokens, "
            "which is the most that max_length or the model allows; lower max_new_tokens",
            param="max_new_tokens",
        )
    return length


def _sampler(policy: Policy, config: DARConfig, longest: int) -> Sampler:
    eos_ids = loading.eos_ids(policy.model, policy.tokenizer)
    sampler = Sampler(config, policy.tokenizer, eos_ids=eos_ids, max_length=longest)
    sampler.check(policy.model)
    return sampler


def _check_tokens(rows: Rows, encoder: PromptEncoder, vocabulary: int) -> None:
    """Check every prompt if the tokenizer has more tokens than the model, maybe only for padding."""
    for index in range(len(rows)):
        with naming_row(index):
            check_tokens([encoder(rows[index]).ids], vocabulary)
