"""``openrlhf``: servers written for OpenRLHF's ``--remote_rm_url``, like its ``serve_rm``.

Lists go out by position: ``query`` (prompt and completion as one text), ``prompts`` and ``labels``. Back comes ``rewards`` by
position, perhaps with ``scores`` and ``extra_logs`` beside it, or the bare list.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dar.protocol.rewards import MAX_SAMPLES, load_json
from dar.rewards.base import RequestBatch, RewardResult, Scored
from dar.rewards.http.wire import to_json
from dar.rewards.protocols.strict import kind, number, parts, prompt_text, refuse, same_length


class OpenRLHFProtocol:
    """Speaks with a remote reward model of OpenRLHF.

    Args:
        coerce: Whether numeric texts and booleans are rewards.
    """

    name = "openrlhf"
    max_samples: int | None = MAX_SAMPLES

    def __init__(self, *, coerce: bool = False) -> None:
        self._coerce = coerce

    def encode(self, batch: RequestBatch) -> bytes:
        """The body of a request; see `RewardProtocol`."""
        prompts = [prompt_text(sample, self.name) for sample in batch.samples]
        queries = [
            prompt + sample.completion
            for prompt, sample in zip(prompts, batch.samples, strict=True)
        ]
        labels = [sample.columns.get("ground_truth") for sample in batch.samples]
        return to_json({"query": queries, "prompts": prompts, "labels": labels})

    def decode(self, body: bytes, batch: RequestBatch) -> list[RewardResult]:
        """The results in an answer; see `RewardProtocol`."""
        answer, count = load_json(body), len(batch.samples)
        beside: Mapping[str, Any] = {}
        if isinstance(answer, Mapping):
            if "rewards" not in answer:
                refuse("form", "the answer has no rewards")
            answer, beside = answer["rewards"], answer
        elif not isinstance(answer, list):
            refuse(
                "type", f"the answer must be an object with rewards or a list, not {kind(answer)}"
            )
        values = same_length(_flat(answer, count), count, "rewards")
        return [
            Scored(
                number(value, f"rewards.{place}", coerce=self._coerce),
                parts(_logged(beside, place, count)),
            )
            for place, value in enumerate(values)
        ]


def _flat(rewards: object, count: int) -> object:
    """Undo what servers do to the list: a single reward comes bare, and tensors come as one row or one column."""
    if not isinstance(rewards, list):
        is_single = count == 1 and isinstance(rewards, int | float | str)
        return [rewards] if is_single else rewards
    if not rewards or not all(isinstance(row, list) for row in rewards):
        return rewards
    if len(rewards) == 1:
        return rewards[0]
    return [row[0] for row in rewards] if all(len(row) == 1 for row in rewards) else rewards


def _logged(answer: Mapping[str, Any], place: int, count: int) -> Iterator[tuple[object, object]]:
    """What was logged for the sample at ``place``, by name."""
    logs = answer.get("extra_logs")
    named = {"scores": answer.get("scores"), **(logs if isinstance(logs, Mapping) else {})}
    for name, values in named.items():
        flat = _flat(values, count)
        if isinstance(flat, list) and len(flat) == count:
            yield name, flat[place]
