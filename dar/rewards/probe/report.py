"""Collects what a probe finds, with advice for each finding, and builds the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dar.protocol.reward_probe import ProbeExchange, ProbeFinding, ProbeReport, ProbeStep
from dar.rewards.base import RewardResult, Scored
from dar.rewards.probe.client import ProbeCall, ProbeClient
from dar.rewards.scoring.step_report import quantile

NAMES = {
    1: "address",
    2: "answer",
    3: "determinism",
    4: "order",
    5: "load",
    6: "signature",
    7: "unusual texts",
    8: "spread",
    9: "later results",
}
MAX_EXCHANGES = 8
MAX_DETAIL = 1000
"""Characters of a finding's text, which may quote the service."""
_OWN_SAMPLES = (
    "See the answer under exchange. If the service needs columns, probe it with samples of your "
    "own."
)
ADVICE = {
    "config.url": "Correct the URL.",
    "config.redirect": "Use the address that the redirect leads to: redirects are never followed.",
    "config.prompt": "Send samples whose prompt is a text, or choose the protocol dar.reward.v1.",
    "config.plain_http": "Serve it over https://. Without it, requests and rewards can be read and "
    "changed on the way.",
    "configuration_error": "Correct the secret or the header that is named.",
    "egress_denied": "Use a public address, or have the operator allow this one "
    "(DAR_EGRESS_ALLOW_HOSTS, DAR_EGRESS_ALLOW_CIDRS).",
    "dns": "Check the host name, and that it can be resolved where the trainer runs.",
    "connect": "Check that the service is running, listens on this port, and is not behind a "
    "firewall.",
    "connect_timeout": "Check that the address is right and no firewall drops the connection.",
    "protocol": "Check that an HTTP/1.1 server listens there, and whether the URL should start "
    "with https:// or http://.",
    "tls.certificate": "Renew the certificate for this host name, from an authority that the "
    "trainer's machine trusts.",
    "tls.client_certificate": "No client certificate is ever sent. Have the service check the "
    "signature or a secret header instead.",
    "tls.alert": "Check that this server serves the host name of the URL, accepts TLS 1.2 or newer, "
    "and requires no client certificate.",
    "tls.broken": "See the log of the server, or of the proxy in front of it: it must not require a "
    "client certificate, and must not send anything unencrypted.",
    "tls.timeout": "Check that a server with TLS listens on this port, and that it has time for new "
    "connections.",
    "tls.version": "Enable TLS 1.2 or newer on the server.",
    "tls.weak": "Renew the TLS settings of the server: keys of RSA with 2048 bits or of an elliptic "
    "curve, a key exchange by ECDHE, signatures with SHA-256.",
    "tls.expires_soon": "Renew the certificate before the job ends. After it expires, every "
    "request fails.",
    "timeout": "Make the service faster, send fewer samples at once (batch.max_samples), or raise "
    "timeouts.attempt and timeouts.read.",
    "deadline": "Raise timeouts.deadline, or make the service faster.",
    "http_401": "Send the secret that the service checks signatures with, or the header that it "
    "requires.",
    "http_403": "Send the secret or the header that the service requires.",
    "http_404": "Check the path of the URL.",
    "http_405": "Check the path of the URL: it must accept POST.",
    "http_400": _OWN_SAMPLES,
    "http_422": _OWN_SAMPLES,
    "http_429": "Let the service accept more requests, or lower limits.concurrency or set "
    "limits.rps.",
    "http_413": "Raise the server's limit on request bodies, or lower batch.max_samples and "
    "batch.max_bytes.",
    "contract.content_type": "Answer with content-type: application/json. A login page or a proxy "
    "may have answered instead of the service.",
    "contract.content_encoding": "Do not compress answers; a proxy may compress them by default.",
    "contract.length": "Return one reward for each sample, in their order.",
    "contract.ids": "Return each sample's id exactly once, or the plain list rewards.",
    "contract.nonfinite": "Report a completion that cannot be scored as an error or a skip; NaN "
    "and Infinity are not rewards.",
    "contract.range": "Keep rewards within ±1e6. A larger number is probably not a reward.",
    "contract.json": "Send valid JSON, and nothing before or after it.",
    "contract.request_mismatch": "Return the request_id of the request; an answer with another one "
    "may come from a cache.",
    "contract.signature": "Sign answers with the endpoint's secret, or set "
    "require_signed_responses to false.",
    "contract.status": "Answer with 200, or set reply to either if results come later.",
    "contract.size": "Send less: the limit of an answer is 8 MiB.",
    "contract.unframed": "Send a content-length, as web frameworks do, or answer with an object.",
    "contract.poll_url": "Return a poll_url on the service's own origin, or post to the callback "
    "that the request offers. `dar reward check URL` offers a callback only to services on the "
    "same machine: register any other service, and check it by its rwe_ id.",
    "samples.unscored": "If the service needs columns such as ground_truth, probe it with samples "
    "of your own.",
    "samples.failed": "See why the service reported an error for this sample.",
    "samples.skipped": "A skipped sample is not trained on. Probe with samples that the reward "
    "applies to.",
    "determinism.same_id": "Keep answers by webhook-id for some minutes: if an answer is lost, the "
    "same request is sent again, and a new answer may differ.",
    "determinism.random": "Make the score a function of the completion alone: temperature 0 for a "
    "judge, fixed seeds. The policy cannot learn from noise.",
    "order.position": "Match results to samples by id; a sample's position in a request must not "
    "change its score.",
    "order.batch": "Score each sample on its own: the other samples in its request change from "
    "step to step.",
    "load.errors": "Lower limits.concurrency to what the service can handle, or give the service "
    "more capacity.",
    "load.throttled": "Lower limits.concurrency as suggested, or raise the service's own rate "
    "limit.",
    "load.slow": "Raise timeouts.attempt as suggested, or lower batch.max_samples: some requests "
    "will time out.",
    "load.queueing": "Lower limits.concurrency as suggested: further requests only wait inside the "
    "service. Or give the service more capacity.",
    "signature.unverified": "Verify webhook-signature (dar.rewards.server does, and so does every "
    "Standard Webhooks library). Anybody who knows the URL can use the service now.",
    "signature.crash": "Answer a request with a wrong signature with 401.",
    "text.failed": "Score any text, or report an error for that sample alone: models may write "
    "anything.",
    "spread.constant": "If completions of your task also get equal rewards, nothing is learned. "
    "Probe with a good and a bad completion of your own.",
    "spread.noise": "With two completions per prompt (K = 2), noise decides which one is better. "
    "Reduce the noise, draw more completions per prompt, or set combine.tie_eps to about the "
    "noise.",
    "async.no_result": "Post the result to reply.callback.url with its token before "
    "reply.deadline, or answer polls; the service must be able to reach the callback URL.",
    "async.not_consumed": "Report it to the operator of this installation: a second callback must "
    "be answered with duplicate.",
    "client_fault": "Report it as a fault of this product, with the answer under exchange.",
    "unfinished": "Probe again with more time, or find out why the service is slow.",
}
ADVICE_BY_PREFIX = {
    "http_5": "See the service's own log: it failed while answering.",
    "http_4": "See the answer under exchange; the service rejects the request.",
    "contract.": "Correct the answer: docs/rewards.md describes the format.",
    "tls.": "Correct the server's TLS settings.",
    "config.": "Correct the component.",
    "service.": "See why the service reported an error for this sample.",
}


def advice_for(code: str) -> str:
    """What to do about a finding with this code; may be empty."""
    if code in ADVICE:
        return ADVICE[code]
    return next((text for start, text in ADVICE_BY_PREFIX.items() if code.startswith(start)), "")


class ReportBuilder:
    """Collects findings; ``step`` is the current step."""

    def __init__(self) -> None:
        self.step = 1
        self.client: ProbeClient | None = None
        self.latencies: Sequence[float] = ()
        """Seconds of full requests under load, or of all others if that step was skipped."""
        self.noise: float | None = None
        """Largest difference between two rewards of one completion; None: not measured."""
        self.same_id_noise: float | None = None
        self.suggested: dict[str, Any] = {}
        self._errors: list[ProbeFinding] = []
        self._warnings: list[ProbeFinding] = []
        self._details: dict[int, str] = {}
        self._skipped: dict[int, str] = {}
        self._exchanges: list[ProbeExchange] = []

    @property
    def has_errors(self) -> bool:
        """Whether a job could not get rewards."""
        return bool(self._errors)

    def error(self, code: str, detail: str, call: ProbeCall | None = None) -> None:
        """Add a finding that keeps a job from getting rewards."""
        self._errors.append(self._finding(code, detail, call))

    def warn(self, code: str, detail: str, call: ProbeCall | None = None) -> None:
        """Add a finding that makes rewards worse, slower or less safe."""
        self._warnings.append(self._finding(code, detail, call))

    def failed(self, call: ProbeCall) -> None:
        """Add the failure of a request as an error."""
        assert call.failure is not None
        code = "async.no_result" if call.code == "callback_late" else call.code
        self.error(code, call.failure.full_reason, call)

    def done(self, detail: str) -> None:
        """End the current step."""
        self._details[self.step] = self._shortened(detail)

    def skip(self, why: str) -> None:
        """Skip the current step."""
        self._skipped[self.step] = why

    def show(self, call: ProbeCall) -> None:
        """Keep a request and its answer for the report."""
        if self.client is not None and len(self._exchanges) < MAX_EXCHANGES:
            self._exchanges.append(self.client.exchange(self.step, call))

    def build(self) -> ProbeReport:
        """The report of everything so far."""
        ordered = sorted(self.latencies)
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        return ProbeReport(
            ok=not self._errors,
            errors=self._errors,
            warnings=sorted(self._warnings, key=lambda finding: finding.step),
            steps=[self._step(number) for number in NAMES],
            latency_ms={
                name: round(quantile(ordered, share) * 1000, 3) if ordered else None
                for name, share in shares.items()
            },
            determinism={
                "max_abs_diff": _finite(self.noise),
                "same_id_max_abs_diff": _finite(self.same_id_noise),
            },
            suggested=self.suggested,
            exchange=sorted(self._exchanges, key=lambda exchange: exchange.step),
        )

    def _finding(self, code: str, detail: str, call: ProbeCall | None) -> ProbeFinding:
        if call is not None:
            self.show(call)
        text = self._shortened(detail)
        return ProbeFinding(code=code, step=self.step, detail=text, advice=advice_for(code))

    def _shortened(self, text: str) -> str:
        return (text if self.client is None else self.client.redact(text))[:MAX_DETAIL]

    def _step(self, number: int) -> ProbeStep:
        found = {
            finding.step: status
            for status, findings in (("warn", self._warnings), ("fail", self._errors))
            for finding in findings
        }
        status: Literal["ok", "warn", "fail", "skipped"] = "skipped"
        detail = self._skipped.get(number, "an earlier step failed")
        if number in found:
            status = "fail" if found[number] == "fail" else "warn"
            detail = self._details.get(number, "")
        elif number in self._details:
            status, detail = "ok", self._details[number]
        return ProbeStep(step=number, name=NAMES[number], status=status, detail=detail)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def difference(first: RewardResult, second: RewardResult) -> float:
    """Distance of two results of one completion; infinite if only one of them is a reward."""
    if isinstance(first, Scored) and isinstance(second, Scored):
        return abs(first.reward - second.reward)
    return 0.0 if type(first) is type(second) else math.inf


def largest_difference(
    first: Mapping[str, RewardResult], second: Mapping[str, RewardResult]
) -> float:
    """The largest difference between results of equal id, over the ids of ``second``."""
    return max((difference(first[name], result) for name, result in second.items()), default=0.0)


def in_words(distance: float) -> str:
    """A difference of two rewards as text."""
    return f"{distance:.3g}" if math.isfinite(distance) else "a reward once, none the other time"


def rewards_in(results: Iterable[RewardResult]) -> list[float]:
    """The results that are rewards."""
    return [result.reward for result in results if isinstance(result, Scored)]
