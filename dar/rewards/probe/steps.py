"""Steps 2 to 4 and 6 to 8 of a probe: what a service answers, and whether it would answer the same again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dar.errors import RewardContractError
from dar.protocol.reward_spec import RewardComponent
from dar.rewards.base import Failed, RewardResult, RewardSample, Skipped
from dar.rewards.probe.client import Asked, Line
from dar.rewards.probe.report import (
    SAME,
    Notes,
    in_words,
    largest_difference,
    rewards_in,
)

NOISY = 0.2
"""Share of the spread that noise may have."""
LONG_CHARACTERS = 64 * 1024
UNUSUAL = {
    "accents and CJK": "naïve café, Ångström; 東京の天気は晴れです。",
    "right-to-left text": "שלום עולם \u202eمرحبا بالعالم\u202c",  # noqa: RUF001 - Arabic, meant as such
    "emoji": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽",
    "control characters": "\x00\x07\x1b[31m\r\n\t\u2028\ufeff",
    "markup": "<script>alert(1)</script> {{x}} ${y} %s \\\" '; -- \N{REPLACEMENT CHARACTER}",
    "spaces": " \n\n\t ",
    "an empty text": "",
}


@dataclass(slots=True)
class ProbeSession:
    """A probe as it goes on."""

    component: RewardComponent
    line: Line
    notes: Notes
    samples: Sequence[RewardSample]
    are_own: bool
    """Whether the user gave the samples."""
    first: Mapping[str, RewardResult] = field(default_factory=dict)
    """The results of step 2, by id."""
    unusual: Sequence[RewardResult] = ()
    """The results of step 7."""
    is_done: bool = False
    """Nothing more can be learned."""
    seconds: list[float] = field(default_factory=list)
    """Of the requests that were answered, but for those under load."""

    async def ask_all(self, *, loses_first: bool = False) -> list[Asked]:
        """Ask for the rewards of all samples, in as few requests as may be; the first failure ends it."""
        size = self.line.max_samples
        asked: list[Asked] = []
        for start in range(0, len(self.samples), size):
            part = self.samples[start : start + size]
            asked.append(await self.line.ask(part, loses_first=loses_first))
            if asked[-1].failure is not None:
                break
        self.seconds += [one.seconds for one in asked if one.failure is None]
        return asked


def by_id(asked: Sequence[Asked]) -> dict[str, RewardResult]:
    """The results of several requests."""
    return {
        sample.id: result
        for one in asked
        for sample, result in zip(one.samples, one.results, strict=True)
    }


async def check_answer(session: ProbeSession) -> None:
    """Step 2: one request, whose answer must be what the protocol says."""
    notes = session.notes
    asked = await session.ask_all()
    if asked[-1].failure is not None:
        notes.failed(asked[-1])
        session.is_done = True
        return
    notes.show(asked[0])
    session.first = by_id(asked)
    rewards = rewards_in(session.first.values())
    failed = [result for result in session.first.values() if isinstance(result, Failed)]
    skipped = [result for result in session.first.values() if isinstance(result, Skipped)]
    if failed:
        told = (
            f"{len(failed)} of {len(session.first)} samples: {failed[0].code}: {failed[0].message}"
        )
        if session.are_own:
            notes.error("samples.failed", told, asked[0])
        else:
            notes.warn("samples.unscored", told)
    if len(skipped) == len(session.first):
        notes.warn("samples.skipped", "every sample was skipped")
    shown = ", ".join(f"{reward:.4g}" for reward in rewards)
    notes.done(f"{len(rewards)} of {len(session.first)} samples scored: {shown}")


async def check_determinism(session: ProbeSession) -> None:
    """Step 3: the same samples under a new id, and that request once more as if its answer had been lost."""
    notes = session.notes
    asked = await session.ask_all(loses_first=True)
    if asked[-1].failure is not None:
        notes.failed(asked[-1])
        return
    again = by_id(asked)
    notes.noise = largest_difference(session.first, again)
    try:
        lost = {
            sample.id: result
            for one in asked
            if one.wire.lost is not None
            for sample, result in zip(one.samples, session.line.lost_results(one), strict=True)
        }
    except RewardContractError as error:
        notes.error(error.error_code, error.message, asked[0])
        return
    if lost:
        notes.same_id_noise = largest_difference(again, lost)
        notes.noise = max(notes.noise, largest_difference(session.first, lost))
    if (notes.same_id_noise or 0.0) > SAME:
        told = in_words(notes.same_id_noise or 0.0)
        notes.warn("determinism.same_id", f"the very same request got another answer: {told}")
    if notes.noise > SAME:
        told = in_words(notes.noise)
        notes.warn("determinism.random", f"the same completion got another reward: {told}")
    same = "not tried" if notes.same_id_noise is None else in_words(notes.same_id_noise)
    notes.done(
        f"largest difference {in_words(notes.noise)}; of one request sent twice under one id: {same}"
    )


async def check_order(session: ProbeSession) -> None:
    """Step 4: the same samples in reversed order, and one by one."""
    notes, line = session.notes, session.line
    if min(line.max_samples, len(session.samples)) == 1:
        notes.skip("requests hold one sample each")
        return
    noise = notes.noise or 0.0
    tolerance = max(SAME, 2 * noise)
    turned = list(reversed(session.samples[: line.max_samples]))
    distances: dict[str, float] = {}
    for code, rounds in (
        ("order.position", [turned]),
        ("order.batch", [[sample] for sample in session.samples]),
    ):
        asked = [await line.ask(part) for part in rounds]
        session.seconds += [one.seconds for one in asked if one.failure is None]
        failed = next((one for one in asked if one.failure is not None), None)
        if failed is not None:
            notes.failed(failed)
            return
        distances[code] = largest_difference(session.first, by_id(asked))
    if distances["order.position"] > tolerance:
        told = in_words(distances["order.position"])
        notes.warn("order.position", f"in reversed order, a sample's reward changes: {told}")
    elif distances["order.batch"] > tolerance:
        told = in_words(distances["order.batch"])
        notes.warn("order.batch", f"asked for alone, a sample's reward changes: {told}")
    notes.done(
        f"reversed: {in_words(distances['order.position'])}; one by one: {in_words(distances['order.batch'])}"
    )


async def check_signature(session: ProbeSession) -> None:
    """Step 6: a request that somebody else has signed must be refused."""
    notes, component = session.notes, session.component
    if not session.line.is_signed:
        notes.skip("no secret was given, so requests are not signed")
        return
    if component.protocol != "dar.reward.v1":
        notes.skip(f"services of protocol {component.protocol} check no signatures")
        return
    asked = await session.line.ask(session.samples[:1], is_forged=True)
    status = asked.wire.answer.status if asked.wire.answer else None
    if asked.failure is not None:
        status = asked.failure.status
    if status in {200, 202}:
        notes.warn(
            "signature.unverified", f"a request with a wrong signature got HTTP {status}", asked
        )
    elif status is None or status >= 500:
        assert asked.failure is not None
        notes.warn("signature.crash", f"a wrong signature got: {asked.failure.full_reason}", asked)
    else:
        notes.done(f"a wrong signature got HTTP {status}")
        return
    notes.done("")


async def check_texts(session: ProbeSession) -> None:
    """Step 7: completions as models write them on their bad days."""
    notes, line = session.notes, session.line
    room = min(LONG_CHARACTERS, session.component.batch.max_bytes // 2)
    texts = {**UNUSUAL, "a very long text": ("Lorem ipsum dolor sit amet. " * room)[:room]}
    # Where columns are missing every sample fails, and that says nothing about its text.
    was_scored = not any(isinstance(result, Failed) for result in session.first.values())
    results: list[RewardResult] = []
    failed = 0
    for place, (what, text) in enumerate(texts.items()):
        tokens = len(text.split())
        sample = replace(
            session.samples[0], id=f"u{place}", index=place, completion=text, completion_tokens=tokens
        )  # fmt: skip
        asked = await line.ask([sample])
        trouble = _trouble(asked, is_telling=was_scored)
        if trouble is None:
            results += asked.results
        elif asked.code != "http_413":
            failed += 1
            notes.warn("text.failed", f"{what}: {trouble}", asked)
    session.unusual = results
    notes.done(f"{len(texts) - failed} of {len(texts)} kinds of text got an answer")


def _trouble(asked: Asked, *, is_telling: bool) -> str | None:
    if asked.failure is not None:
        return f"{asked.code}: {asked.failure.full_reason}"
    result = asked.results[0]
    if is_telling and isinstance(result, Failed):
        return f"{result.code}: {result.message}"
    return None


async def check_spread(session: ProbeSession) -> None:
    """Step 8: rewards must tell completions apart, and more so than chance does."""
    notes = session.notes
    own = rewards_in(session.first.values())
    all_of_them = own + rewards_in(session.unusual)
    if len(all_of_them) < 2:
        notes.skip("fewer than two rewards to compare")
        return
    spread = max(all_of_them) - min(all_of_them)
    if spread <= SAME:
        notes.warn(
            "spread.constant", f"{len(all_of_them)} completions all got {all_of_them[0]:.4g}"
        )
    noise = notes.noise or 0.0
    if len(own) > 1 and SAME < noise < math.inf:
        told = max(own) - min(own)
        if noise > NOISY * told:
            notes.warn("spread.noise", f"noise {noise:.3g} where rewards spread over {told:.3g}")
    notes.done(f"from {min(all_of_them):.4g} to {max(all_of_them):.4g}")
