"""Where the scored completions of a step come from: sampled and scored now, or read from the data set."""

import sys
from collections.abc import Mapping

from dar.errors import InvalidRequestError
from dar.training.config.config import DARConfig
from dar.training.data.rows import PromptEncoder, Rows, naming_row
from dar.training.model import loading
from dar.training.model.policy import Policy
from dar.training.parallel.ranks import Ranks
from dar.training.report.sink import Control, Sink
from dar.training.sampling.prompts import EvaluationStream, PromptStream
from dar.training.sampling.sampler import Sampler, check_tokens
from dar.training.step.offline import ReplaySource, RowEncoder, check_replay
from dar.training.step.online import OnlineSource, Scoring
from dar.training.step.records import Mode, Weigher

STREAMS: Mapping[Mode, type[PromptStream]] = {"train": PromptStream, "eval": EvaluationStream}


def make_source(
    policy: Policy,
    config: DARConfig,
    rows: Rows,
    weigher: Weigher,
    *,
    scoring: Scoring | None,
    job_id: str | None,
    sink: Sink,
    control: Control,
    ranks: Ranks,
    mode: Mode = "train",
) -> OnlineSource | ReplaySource:
    """The step source of a training run.

    Args:
        policy: What is sampled from.
        config: Of the run.
        rows: The data set.
        weigher: Turns rewards into weights.
        scoring: How completions are scored; None: they are not sampled, but read from ``rows`` with their rewards.
        job_id: Named to reward services.
        sink: Is told what is done.
        control: Is asked whether to go on.
        ranks: The processes that train together.
        mode: In an evaluation every step is all rows, in their order.

    Raises:
        InvalidRequestError: A row cannot be used, or a prompt and ``max_new_tokens`` do not fit into the model's context.
        TrainingError: The model cannot be sampled from.
    """
    tokenizer = policy.tokenizer
    context = loading.context_length(policy.model) or sys.maxsize
    longest = min(config.max_length or context, context)
    if scoring is None:
        encoder_of_rows = _row_encoder(policy, config, longest)
        count = config.prompts_per_step if mode == "train" else len(rows)
        check_replay(rows, encoder_of_rows, count)
        stream = _stream(mode, rows, encoder_of_rows, config, sink, ranks)
        return ReplaySource(stream, weigher, tokenizer=tokenizer, sink=sink, mode=mode)
    encoder = PromptEncoder(tokenizer, _longest_prompt(config, longest))
    stream = _stream(mode, rows, encoder, config, sink, ranks)
    if max(tokenizer.get_vocab().values()) >= policy.vocabulary:
        _check_tokens(rows, encoder, policy.vocabulary)
    return OnlineSource(
        policy.model,
        stream,
        _sampler(policy, config, longest),
        scoring,
        weigher,
        tokenizer=tokenizer,
        sink=sink,
        control=control,
        job_id=job_id,
        ranks=ranks,
        mode=mode,
    )


def _stream(
    mode: Mode, rows: Rows, encoder: PromptEncoder, config: DARConfig, sink: Sink, ranks: Ranks
) -> PromptStream:
    stream = STREAMS[mode](rows, encoder, config, sink)
    ranks.from_main(stream.try_rows)
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
    if length >= longest:  # no bound at all
        length = longest - config.max_new_tokens
    if length <= 0:
        raise InvalidRequestError(
            f"a prompt and {config.max_new_tokens} new tokens do not fit into {longest} tokens, which is the most that "
            "max_length or the model allows; lower max_new_tokens",
            param="max_new_tokens",
        )
    return length


def _sampler(policy: Policy, config: DARConfig, longest: int) -> Sampler:
    eos_ids = loading.eos_ids(policy.model, policy.tokenizer)
    sampler = Sampler(config, policy.tokenizer, eos_ids=eos_ids, max_length=longest)
    sampler.check(policy.model)
    return sampler


def _check_tokens(rows: Rows, encoder: PromptEncoder, vocabulary: int) -> None:
    """Where the tokenizer has more tokens than the model, which may be for padding alone, try every prompt."""
    for index in range(len(rows)):
        with naming_row(index):
            check_tokens([encoder(rows[index]).ids], vocabulary)
