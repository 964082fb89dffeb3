"""Shared by the protocols: strict number checks, and parts of a reward."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dar.errors import RewardMisconfiguredError
from dar.protocol.rewards import MAX_PARTS, MAX_REWARD, kind, refuse
from dar.rewards.base import RewardSample

PART_LENGTH = 32
_NUMERIC = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def number(value: object, where: str, *, coerce: bool = False) -> float:
    """``value`` as a reward.

    Args:
        value: From an answer.
        where: Its place there, for messages.
        coerce: Whether numeric strings and booleans are numbers.

    Raises:
        RewardContractError: It is not a number (``contract.type``), not finite
            (``contract.nonfinite``) or beyond ±10^6 (``contract.range``).
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        if not coerce or not isinstance(value, bool | str):
            refuse("type", f"{where}: {kind(value)}, but a number is expected")
        if isinstance(value, str) and not _NUMERIC.fullmatch(value.strip()):
            refuse("type", f"{where}: the text {value[:40]!r} is not a number")
    try:
        found = float(value)
    except OverflowError:  # an integer beyond the range of a float
        found = math.inf
    if not math.isfinite(found):
        refuse("nonfinite", f"{where}: not a finite number")
    if abs(found) > MAX_REWARD:
        refuse("range", f"{where}: {found:g} is beyond ±{MAX_REWARD:g}")
    return found


def same_length(values: object, expected: int, where: str) -> list[Any]:
    """``values`` if it is a list with one item per sample.

    Raises:
        RewardContractError: It is not a list (``contract.type``) or has the wrong length
            (``contract.length``).
    """
    if not isinstance(values, list):
        refuse("type", f"{where}: {kind(values)}, but a list is expected")
    if len(values) != expected:
        refuse("length", f"{where}: {len(values)} items for {expected} samples")
    return values


def rewards_in(answer: object) -> object:
    """The rewards of an answer: a list, or the ``rewards`` of an object.

    Raises:
        RewardContractError: It is something else (``contract.type``), or an object without them
            (``contract.form``).
    """
    if isinstance(answer, Mapping):
        if "rewards" not in answer:
            refuse("form", "the answer has no rewards")
        return answer["rewards"]
    if not isinstance(answer, list):
        refuse("type", f"answer with a list or an object with rewards, not {kind(answer)}")
    return answer


def parts(given: Iterable[tuple[object, object]]) -> dict[str, float]:
    """Parts of a reward, for viewing, with valid names.

    Other values than bounded numbers are dropped.

    They never decide whether a reward is valid.
    """
    found: dict[str, float] = {}
    for name, value in given:
        if len(found) == MAX_PARTS:
            break
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value) and abs(value) <= MAX_REWARD:
            found[_free_name(name, found)] = float(value)
    return found


def _free_name(name: object, taken: Mapping[str, float]) -> str:
    plain = re.sub(r"[^a-z0-9_]", "_", str(name).lower())[:PART_LENGTH] or "part"
    free, count = plain, 1
    while free in taken:
        count += 1
        ending = f"_{count}"
        free = plain[: PART_LENGTH - len(ending)] + ending
    return free


def prompt_text(sample: RewardSample, protocol: str) -> str:
    """The prompt as the policy saw it.

    Raises:
        RewardMisconfiguredError: The prompt is a conversation, and its text is unknown.
    """
    text = sample.prompt if sample.prompt is not None else sample.prompt_text
    if text is None:
        raise RewardMisconfiguredError(
            f"protocol {protocol} sends prompts as text, but the prompt of sample {sample.id} is a conversation whose text is not "
            "known here",
            code="config.prompt",
        )
    return text


def sent_columns(sample: RewardSample, columns: Iterable[str] | None) -> dict[str, Any]:
    """The columns that are sent: ``ground_truth``, if present, and ``columns``."""
    names = dict.fromkeys(["ground_truth", *(columns or ())])
    return {name: sample.columns[name] for name in names if name in sample.columns}
