"""Samples: completions stored for viewing, with everything that decided their weight."""

import hashlib
from typing import Any, Literal, get_args

from pydantic import Field

from dar.protocol.base import Count, Input, Output, UnixSeconds

RewardStatus = Literal["reward", "skip", "error"]
FinishReason = Literal["stop", "length"]


SampleFlag = Literal["truncated", "error", "skipped", "unscored"]
"""What is unusual about a sample: its completion reached the longest length, its reward failed, a
source skipped it, or it has no reward for any reason."""
FLAGS: tuple[SampleFlag, ...] = get_args(SampleFlag)


def prompt_id_of(prompt: str) -> str:
    """The id of a prompt, the same in all steps and jobs: of its text, as samples have it."""
    return f"prompt-{hashlib.sha256(prompt.encode()).hexdigest()[:16]}"


class ReportedSample(Input):
    """A sample as the trainer reports it.

    All log-probabilities are sums over completion tokens, in nats.
    """

    group: Count
    """Number of the prompt in the step, from 0."""
    index: Count
    """Number of the completion among the K of its prompt, from 0."""
    prompt: str
    completion: str
    finish_reason: FinishReason
    completion_tokens: Count
    reward: float | None
    """None: missing, because a source skipped the sample or failed."""
    reward_status: RewardStatus
    reward_message: str | None = None
    components: dict[str, float | None] = Field(default_factory=dict)
    """Raw reward of each component. A part that its service reported is ``<component>/<part>``."""
    feedback: dict[str, str] = Field(default_factory=dict)
    """Feedback of reward services about the sample, by component."""
    advantage: float | None
    weight: float | None
    logp_policy: float | None
    logp_ref: float | None
    logp_behavior: float


class Sample(Output):
    """A sample as the API returns it."""

    id: str
    object: Literal["fine_tuning.job.sample"]
    created_at: UnixSeconds
    step: int
    attempt: int
    rewound: bool = False
    """Whether the step is after the checkpoint from which a later attempt started, or with which
    the job has ended."""
    group: int
    index: int
    prompt_id: str | None = None
    """Of the prompt's text, to find all its samples."""
    flags: list[SampleFlag] = Field(default_factory=list)
    """What is unusual about it."""
    prompt: str
    completion: str
    finish_reason: FinishReason
    completion_tokens: int
    reward: float | None
    reward_status: RewardStatus
    reward_message: str | None
    components: dict[str, Any]
    feedback: dict[str, str]
    advantage: float | None
    weight: float | None
    logp_policy: float | None
    logp_ref: float | None
    logp_behavior: float
