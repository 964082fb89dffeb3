"""The statuses of a job and of an attempt."""

from typing import Literal, get_args

JobStatus = Literal[
    "validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"
]
"""OpenAI's six statuses, and ``pausing`` and ``paused``."""

StatusDetail = Literal[
    "backoff",
    "waiting_for_reward",
    "starting",
    "calibrating",
    "sampling",
    "training",
    "evaluating",
    "checkpointing",
    "blocked: disk",
    "stopping",
    "cancelling",
    "by_user",
    "reward",
    "user_error",
    "poison",
    "reward_budget_exhausted",
    "system_error",
]
"""What a job does within its status, or why it ended."""

AttemptStatus = Literal["running", "succeeded", "failed", "lost", "drained", "cancelled"]

TERMINAL: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
"""A job with one of these statuses uses no GPU, and only an explicit resume changes it."""

JOB_STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
