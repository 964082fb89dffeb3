"""Steps 2 to 4 and 6 to 9 of a probe: the answer, and whether a second answer would be the same."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dar.errors import RewardContractError
from dar.protocol.hints import HINTS
from dar.rewards.base import Failed, RewardResult, RewardSample, Skipped
from dar.rewards.probe.callbacks import ProbeInbox
from dar.rewards.probe.client import ProbeCall, ProbeClient
from dar.rewards.probe.report import ReportBuilder, in_words, largest_difference, rewards_in

LONG_CHARACTERS = 64 * 1024
UNUSUAL = {
    "accents and CJK": "naïve café, Ångström; 東京の天気は晴れです。",
    "right-to-left text": "שלום עולם \u202eمرحبا بالعالم\u202c",  # noqa: RUF001 - Arabic on purpose
    "emoji": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽",
    "control characters": "\x00\x07\x1b[31m\r\n\t\u2028\ufeff",
    "markup": "<script>alert(1)</script> {{x}} ${y} %s \\\" '; -- \N{REPLACEMENT CHARACTER}",
    "spaces": " \n\n\t ",
    "an empty text": "",
}


@dataclass(slots=True)
class ProbeSession:
    """The state of a probe that its steps share."""

    client: ProbeClient
    report: ReportBuilder
    samples: Sequence[RewardSample]
    are_own: bool
    """Whether the samples are the user's."""
    first: Mapping[str, RewardResult] = field(default_factory=dict)
    """The results of step 2, by id."""
    unusual: Sequence[RewardResult] = ()
    """The results of step 7."""
    seconds: list[float] = field(default_factory=list)
    """Durations of answered requests, without those of step 5."""

    async def send(
        self, parts: Iterable[Sequence[RewardSample]], *, loses_first: bool = False
    ) -> list[ProbeCall]:
        """Send one request for each part, until one fails."""
        calls: list[ProbeCall] = []
        for part in parts:
            calls.append(await self.client.send(part, loses_first=loses_first))
            if calls[-1].failure is not None:
                break
        self.seconds += [call.seconds for call in calls if call.failure is None]
        return calls

    def parts(self) -> list[Sequence[RewardSample]]:
        """All samples, in as few requests as possible."""
        size = self.client.max_samples
        return [self.samples[start : start + size] for start in range(0, len(self.samples), size)]


def by_id(calls: Sequence[ProbeCall]) -> dict[str, RewardResult]:
    """The results of several requests."""
    return {
        sample.id: result
        for call in calls
        for sample, result in zip(call.samples, call.results, strict=True)
    }


async def check_answer(session: ProbeSession) -> None:
    """Step 2: one request; its answer must follow the protocol."""
    report = session.report
    calls = await session.send(session.parts())
    if calls[-1].failure is not None:
        report.failed(calls[-1])
        return
    report.show(calls[0])
    session.first = by_id(calls)
    rewards = rewards_in(session.first.values())
    failed = [result for result in session.first.values() if isinstance(result, Failed)]
    skipped = [result for result in session.first.values() if isinstance(result, Skipped)]
    if failed:
        text = (
            f"{len(failed)} of {len(session.first)} samples: {failed[0].code}: {failed[0].message}"
        )
        if session.are_own:
            report.error("samples.failed", text, calls[0])
        else:
            report.warn("samples.unscored", text)
    if len(skipped) == len(session.first):
        report.warn("samples.skipped", "every sample was skipped")
    shown = ", ".join(f"{reward:.4g}" for reward in rewards)
    report.done(f"{len(rewards)} of {len(session.first)} samples scored: {shown}")


async def check_determinism(session: ProbeSession) -> None:
    """Step 3: the same samples under a new id, and that request again as if its answer was lost."""
    report = session.report
    calls = await session.send(session.parts(), loses_first=True)
    if calls[-1].failure is not None:
        report.failed(calls[-1])
        return
    again = by_id(calls)
    report.noise = largest_difference(session.first, again)
    try:
        lost = {
            sample.id: result
            for call in calls
            if call.wire.lost is not None
            for sample, result in zip(call.samples, session.client.lost_results(call), strict=True)
        }
    except RewardContractError as error:
        report.error(error.error_code, error.message, calls[0])
        return
    if lost:
        report.same_id_noise = largest_difference(again, lost)
        report.noise = max(report.noise, largest_difference(session.first, lost))
    if (report.same_id_noise or 0.0) > HINTS.probe_equal:
        text = in_words(report.same_id_noise or 0.0)
        report.warn("determinism.same_id", f"the same request got a different answer: {text}")
    if report.noise > HINTS.probe_equal:
        text = in_words(report.noise)
        report.warn("determinism.random", f"the same completion got a different reward: {text}")
    same = "not tried" if report.same_id_noise is None else in_words(report.same_id_noise)
    report.done(f"largest difference {in_words(report.noise)}; same request sent twice: {same}")


async def check_order(session: ProbeSession) -> None:
    """Step 4: the same samples in reverse order, and one by one."""
    report, size = session.report, session.client.max_samples
    if min(size, len(session.samples)) == 1:
        report.skip("each request holds one sample")
        return
    noise = report.noise or 0.0
    tolerance = max(HINTS.probe_equal, 2 * noise)
    turned = list(reversed(session.samples[:size]))
    distances: dict[str, float] = {}
    for code, rounds in (
        ("order.position", [turned]),
        ("order.batch", [[sample] for sample in session.samples]),
    ):
        calls = await session.send(rounds)
        if calls[-1].failure is not None:
            report.failed(calls[-1])
            return
        distances[code] = largest_difference(session.first, by_id(calls))
    if distances["order.position"] > tolerance:
        text = in_words(distances["order.position"])
        report.warn("order.position", f"in reverse order, a sample's reward changes: {text}")
    elif distances["order.batch"] > tolerance:
        text = in_words(distances["order.batch"])
        report.warn("order.batch", f"in a request of its own, a sample's reward changes: {text}")
    reverse, single = (in_words(distances[code]) for code in ("order.position", "order.batch"))
    report.done(f"reversed: {reverse}; one by one: {single}")


async def check_signature(session: ProbeSession, protocol: str) -> None:
    """Step 6: the service must reject a request with a wrong signature."""
    report = session.report
    if not session.client.is_signed:
        report.skip("no secret was given, so requests are not signed")
        return
    if protocol != "dar.reward.v1":
        report.skip(f"services of protocol {protocol} check no signatures")
        return
    call = await session.client.send(session.samples[:1], is_forged=True)
    status = call.wire.answer.status if call.wire.answer else None
    if call.failure is not None:
        status = call.failure.status
    if status in {200, 202}:
        report.warn("signature.unverified", f"a wrong signature got HTTP {status}", call)
    elif status is None or status >= 500:
        assert call.failure is not None
        report.warn("signature.crash", f"a wrong signature got: {call.failure.full_reason}", call)
    else:
        report.done(f"a wrong signature got HTTP {status}")
        return
    report.done("")


async def check_texts(session: ProbeSession, max_bytes: int) -> None:
    """Step 7: unusual completions, as models write them at times."""
    report, client = session.report, session.client
    room = min(LONG_CHARACTERS, max_bytes // 2)
    texts = {**UNUSUAL, "a very long text": ("Lorem ipsum dolor sit amet. " * room)[:room]}
    # If columns are missing every sample fails, whatever its text.
    was_scored = not any(isinstance(result, Failed) for result in session.first.values())
    results: list[RewardResult] = []
    failed = 0
    for place, (what, text) in enumerate(texts.items()):
        tokens = len(text.split())
        sample = replace(
            session.samples[0],
            id=f"u{place}",
            index=place,
            completion=text,
            completion_tokens=tokens,
        )
        call = await client.send([sample])
        failure = _failure_of(call, counts_samples=was_scored)
        if failure is None:
            results += call.results
        elif call.code != "http_413":
            failed += 1
            report.warn("text.failed", f"{what}: {failure}", call)
    session.unusual = results
    report.done(f"{len(texts) - failed} of {len(texts)} kinds of text got an answer")


def _failure_of(call: ProbeCall, *, counts_samples: bool) -> str | None:
    if call.failure is not None:
        return f"{call.code}: {call.failure.full_reason}"
    result = call.results[0]
    if counts_samples and isinstance(result, Failed):
        return f"{result.code}: {result.message}"
    return None


async def check_spread(session: ProbeSession) -> None:
    """Step 8: rewards must differ between completions, by more than the noise."""
    report = session.report
    own = rewards_in(session.first.values())
    rewards = own + rewards_in(session.unusual)
    if len(rewards) < 2:
        report.skip("fewer than two rewards to compare")
        return
    spread = max(rewards) - min(rewards)
    if spread <= HINTS.probe_equal:
        report.warn("spread.constant", f"{len(rewards)} completions all got {rewards[0]:.4g}")
    noise = report.noise or 0.0
    if len(own) > 1 and HINTS.probe_equal < noise < math.inf:
        own_spread = max(own) - min(own)
        if noise > HINTS.probe_noise * own_spread:
            report.warn("spread.noise", f"noise {noise:.3g}, spread of rewards {own_spread:.3g}")
    report.done(f"from {min(rewards):.4g} to {max(rewards):.4g}")


async def check_later(session: ProbeSession, inbox: ProbeInbox | None, reply: str) -> None:
    """Step 9: after a 202 the result must come, and a second callback must change nothing."""
    report = session.report
    if reply != "either":
        report.skip("the component does not allow later results (reply: sync)")
        return
    call = await session.client.send(session.samples[:1])
    if call.failure is not None:
        report.failed(call)
        return
    if not call.is_accepted:
        report.done("it answered at once, which is allowed")
        return
    request_id = call.wire.sent["webhook-id"]
    if inbox is None or not inbox.has_received(request_id):
        report.done(f"its result was fetched from poll_url after {call.seconds:.2f} s")
        return
    outcome = inbox.repeat(request_id)
    if outcome != "duplicate":
        report.error("async.not_consumed", f"the same callback, sent again, got: {outcome}")
    report.done(f"its callback came after {call.seconds:.2f} s; sent again, it is a duplicate")
