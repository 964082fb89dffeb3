"""The first prompts of a training file, for asking a reward service whether it would give rewards for them."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

from dar.rewards.base import RewardSample

COMPLETION = "This completion only asks whether rewards are given."


def first_prompts(path: Path | None, count: int) -> list[RewardSample]:
    """The first rows of a file, each with its columns and a completion of ours; none where the file is not here.

    Args:
        path: JSON Lines that were checked when they were uploaded; None: the data are on a hub.
        count: Most rows.
    """
    if path is None or not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        lines = itertools.islice(filter(str.strip, file), count)
        return [as_sample(index, json.loads(line)) for index, line in enumerate(lines)]


def as_sample(index: int, row: Mapping[str, object]) -> RewardSample:
    """A row as reward sources take it. What the policy will see of a conversation is known to its worker alone."""
    prompt = row.get("prompt")
    messages = prompt if isinstance(prompt, list) else None
    return RewardSample(
        id=f"s{index}",
        group_id=f"g{index}",
        index=0,
        prompt=None if messages is not None else str(prompt or ""),
        messages=messages,
        completion=COMPLETION,
        finish_reason="stop",
        completion_tokens=len(COMPLETION.split()),
        columns={name: value for name, value in row.items() if name != "prompt"},
        prompt_text=None if messages is None else _plain(messages),
    )


def _plain(messages: list[Mapping[str, object]]) -> str:
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)
