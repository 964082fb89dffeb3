"""Completions without their thinking: what stands in ``<think>…</think>`` is for the policy alone."""

from dataclasses import replace

from dar.rewards.base import RewardSample

OPENING, CLOSING = "<think>", "</think>"


def without_thinking(sample: RewardSample) -> RewardSample:
    """``sample`` without its thinking.

    Every block goes, and with the one at the beginning the white space behind it; a block that is not closed goes to the end. Where
    the prompt ends with ``<think>``, as many chat templates let it, the completion begins inside of a block; so it does where a block
    is closed that was never opened. The tokens go too, as they would still hold it; their number stays that of the whole
    completion.
    """
    told = sample.prompt_text or sample.prompt or ""
    completion = _without(sample.completion, is_inside=told.rstrip().endswith(OPENING))
    return replace(sample, completion=completion, completion_ids=None)


def _without(text: str, *, is_inside: bool) -> str:
    opening, closing = text.find(OPENING), text.find(CLOSING)
    is_inside = is_inside or (closing >= 0 and not 0 <= opening < closing)
    if is_inside:
        text = OPENING + text
    kept: list[str] = []
    rest, has_more = text, True
    while has_more:
        before, found, rest = rest.partition(OPENING)
        kept.append(before)
        _, closed, rest = rest.partition(CLOSING)
        has_more = bool(found and closed)
    has_begun = kept[0].strip()
    return "".join(kept) if has_begun or len(kept) == 1 else "".join(kept).lstrip()
