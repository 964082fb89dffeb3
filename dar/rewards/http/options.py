"""How a reward service is driven."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dar.protocol.reward_spec import RewardBatching, RewardLimits, RewardRetry, RewardTimeouts
from dar.rewards.base import RewardProtocol
from dar.rewards.http.breaker import BreakerOptions
from dar.rewards.http.egress import EgressPolicy, Resolver
from dar.rewards.http.retry_budget import RetryBudgetOptions
from dar.rewards.protocols.native import NativeProtocol


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How a reward service is driven; the first parts are those of the job spec."""

    columns: Sequence[str] | None = None
    """Columns of the prompt's row that are sent beside ``ground_truth``; None: no others."""
    batch: RewardBatching = field(default_factory=RewardBatching)
    limits: RewardLimits = field(default_factory=RewardLimits)
    timeouts: RewardTimeouts = field(default_factory=RewardTimeouts)
    retry: RewardRetry = field(default_factory=RewardRetry)
    protocol: RewardProtocol = field(default_factory=NativeProtocol)
    """What is spoken."""
    prompt_format: Literal["auto", "text"] = "auto"
    """``text`` sends a conversation as the text that the policy saw, where the sample has it."""
    strip_thinking: bool = False
    """Whether completions are sent without their thinking; see `dar.rewards.thinking`."""
    allow_async: bool = False
    """Whether a 202 is accepted, whose result follows."""
    require_signed_responses: bool = False
    """Whether an answer must be signed with one of the secrets."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Secret headers."""
    guard: EgressPolicy | None = None
    """Where requests may go; None: anywhere, for scripts on a user's own machine."""
    breaker: BreakerOptions = field(default_factory=BreakerOptions)
    budget: RetryBudgetOptions = field(default_factory=RetryBudgetOptions)
    is_shared: bool = True
    """Whether connections, limits and breaker are shared with others in this process that name the same endpoint."""
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    """Whom to trust; None: the system's certificate authorities."""
    resolver: Resolver | None = None
    """Another source of addresses than the system's."""
