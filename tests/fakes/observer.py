"""An observer that keeps everything."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dar.rewards.base import RequestRecord, SampleReward


@dataclass
class Seen:
    """An observer that keeps everything."""

    records: list[RequestRecord] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    samples_scored: int = 0
    samples_not_sent: list[tuple[int, int]] = field(default_factory=list)

    def not_sent(self, component: str, hits: int, copies: int) -> None:
        self.samples_not_sent.append((hits, copies))

    def request_done(self, record: RequestRecord) -> None:
        self.records.append(record)

    def breaker_changed(self, component: str, state: str, reason: str) -> None:
        self.states.append(state)
        self.messages.append(reason)

    def scored(self, step: int, rewards: Sequence[SampleReward]) -> None:
        self.samples_scored += len(rewards)

    def poll_ended(self, component: str, request_id: str, code: str, reason: str) -> None:
        self.messages.append(f"{code}: {reason}")

    def waiting(self, component: str, message: str) -> None:
        self.messages.append(message)
