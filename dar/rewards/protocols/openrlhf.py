"""``openrlhf``: servers written for OpenRLHF's ``--remote_rm_url``, like its ``serve_rm``.

A request has lists by position: ``query`` (prompt and completion as one text), ``prompts`` and
``labels``. An answer has ``rewards`` by position, possibly with ``scores`` and ``extra_logs``, or
is the list alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dar.protocol.rewards import MAX_SAMPLES, load_json
from dar.rewards.base import RequestBatch, RewardResult, Scored
from dar.rewards.http.wire import to_json
from dar.rewards.protocols.strict import number, parts, prompt_text, rewards_in, same_length


class OpenRLHFProtocol:
    """Encodes and decodes for a remote reward model of OpenRLHF.

    Args:
        coerce: Whether numeric strings and booleans are numbers.
    """

    name = "openrlhf"
    max_samples: int | None = MAX_SAMPLES

    def __init__(self, *, coerce: bool = False) -> None:
        self._coerce = coerce

    def encode(self, batch: RequestBatch) -> bytes:
        prompts = [prompt_text(sample, self.name) for sample in batch.samples]
        queries = [
            prompt + sample.completion
            for prompt, sample in zip(prompts, batch.samples, strict=True)
        ]
        labels = [sample.columns.get("ground_truth") for sample in batch.samples]
        return to_json({"query": queries, "prompts": prompts, "labels": labels})

    def decode(self, body: bytes, batch: RequestBatch) -> list[RewardResult]:
        answer, count = load_json(body), len(batch.samples)
        beside: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {}
        values = same_length(_flat(rewards_in(answer), count), count, "rewards")
        return [
            Scored(
                number(value, f"rewards.{place}", coerce=self._coerce),
                parts(_logged(beside, place, count)),
            )
            for place, value in enumerate(values)
        ]


def _flat(rewards: object, count: int) -> object:
    """A flat list. Servers send one reward without a list, and tensors as a row or column."""
    if not isinstance(rewards, list):
        is_single = count == 1 and isinstance(rewards, int | float | str)
        return [rewards] if is_single else rewards
    if not rewards or not all(isinstance(row, list) for row in rewards):
        return rewards
    if len(rewards) == 1:
        return rewards[0]
    return [row[0] for row in rewards] if all(len(row) == 1 for row in rewards) else rewards


def _logged(answer: Mapping[str, Any], place: int, count: int) -> Iterator[tuple[object, object]]:
    """The logged values of the sample at ``place``, by name."""
    logs = answer.get("extra_logs")
    named = {"scores": answer.get("scores"), **(logs if isinstance(logs, Mapping) else {})}
    for name, values in named.items():
        flat = _flat(values, count)
        if isinstance(flat, list) and len(flat) == count:
            yield name, flat[place]
