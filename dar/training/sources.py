"""Where the scored completions of a step come from: sampled and scored now, or read from the data set."""

import sys

from dar.errors import InvalidRequestError
from dar.rewards.scorer import RewardScorer
from dar.training import loading
from dar.training.config import DARConfig
from dar.training.data import PromptEncoder, Rows
from dar.training.offline import ReplaySource, check_replay
from dar.training.online import OnlineSource
from dar.training.policy import Policy
from dar.training.sampling import Sampler
from dar.training.sink import Control, Sink
from dar.training.steps import PromptStream, Weigher


def make_source(
    policy: Policy,
    config: DARConfig,
    rows: Rows,
    weigher: Weigher,
    *,
    scorer: RewardScorer | None,
    job_id: str | None,
    sink: Sink,
    control: Control,
) -> OnlineSource | ReplaySource:
    """The step source of a training run: online with a scorer, offline without one.

    Raises:
        InvalidRequestError: A row cannot be used, or a prompt and ``max_new_tokens`` do not fit into the model's context.
        TrainingError: The model cannot be sampled from.
    """
    tokenizer = policy.tokenizer
    context = loading.context_length(policy.model) or sys.maxsize
    longest = min(config.max_length or context, context)
    if scorer is None:
        room = check_replay(rows, config.dar_k, vocabulary=policy.vocabulary, longest=longest)
        encoder = PromptEncoder(
            tokenizer, min(config.max_prompt_length or room, room), is_replay=True
        )
        stream = PromptStream(rows, encoder, config, sink)
        return ReplaySource(stream, weigher, config.dar_k, tokenizer=tokenizer, sink=sink)
    prompt_length = config.max_prompt_length or longest - config.max_new_tokens
    if not 0 < prompt_length < longest:
        raise InvalidRequestError(
            f"a prompt and {config.max_new_tokens} new tokens do not fit into {longest} tokens, which is the most that "
            "max_length or the model allows; lower max_new_tokens",
            param="max_new_tokens",
        )
    stream = PromptStream(rows, PromptEncoder(tokenizer, prompt_length), config, sink)
    eos_ids = loading.eos_ids(policy.model, tokenizer)
    sampler = Sampler(config, tokenizer, eos_ids=eos_ids, max_length=longest)
    sampler.check(policy.model)
    return OnlineSource(
        policy.model,
        stream,
        sampler,
        scorer,
        weigher,
        tokenizer=tokenizer,
        sink=sink,
        control=control,
        job_id=job_id,
    )
