"""``trl``: the keyword arguments and the return value of a reward function of TRL as JSON.

A service only has to call its function ``f(prompts, completions, **kwargs)`` with that object.
"""

from typing import Any

from dar.protocol.rewards import MAX_SAMPLES, load_json
from dar.rewards.base import (
    RequestBatch,
    RewardResult,
    RewardSample,
    Scored,
    Skipped,
    trl_completion,
    trl_prompt,
)
from dar.rewards.http.wire import to_json
from dar.rewards.protocols.strict import number, rewards_in, same_length, sent_columns


class TRLProtocol:
    """Encodes and decodes for a reward function of TRL.

    Args:
        coerce: Whether numeric strings and booleans are numbers.
    """

    name = "trl"
    max_samples: int | None = MAX_SAMPLES

    def __init__(self, *, coerce: bool = False) -> None:
        self._coerce = coerce

    def encode(self, batch: RequestBatch) -> bytes:
        samples = batch.samples
        rows = [sent_columns(sample, batch.columns) for sample in samples]
        names = dict.fromkeys(name for row in rows for name in row)
        content: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
        content |= {
            "prompts": [trl_prompt(sample) for sample in samples],
            "completions": [trl_completion(sample) for sample in samples],
            "completion_ids": _ids(samples),
            "trainer_state": {"global_step": batch.context.steps_done},
        }
        return to_json(content)

    def decode(self, body: bytes, batch: RequestBatch) -> list[RewardResult]:
        rewards = rewards_in(load_json(body))
        return [
            Skipped()
            if value is None
            else Scored(number(value, f"rewards.{place}", coerce=self._coerce))
            for place, value in enumerate(same_length(rewards, len(batch.samples), "rewards"))
        ]


def _ids(samples: tuple[RewardSample, ...]) -> list[list[int]] | None:
    """The token ids of all completions; None if some are unknown."""
    known = [list(s.completion_ids) for s in samples if s.completion_ids is not None]
    return known if len(known) == len(samples) else None
