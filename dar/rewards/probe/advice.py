"""What to do about what a probe finds."""

ADVICE = {
    "config.url": "Correct the URL.",
    "config.redirect": "Use the address that the redirect leads to: redirects are never followed.",
    "config.prompt": "Send samples whose prompt is a text, or choose the protocol dar.reward.v1.",
    "config.plain_http": "Serve it over https://: what is sent here, and what comes back, can be read and altered on the way.",
    "configuration_error": "Correct the secret or the header that is named.",
    "egress_denied": "Use a public address, or have the operator allow this one (DAR_EGRESS_ALLOW_HOSTS, DAR_EGRESS_ALLOW_CIDRS).",
    "dns": "Check the host name, and that it can be resolved where the trainer runs.",
    "connect": "Check that the service is running, listens on this port, and is not behind a firewall.",
    "connect_timeout": "Check that the address is right and no firewall drops the connection.",
    "protocol": "Check that an HTTP/1.1 server listens there, and whether the URL should start with https:// or http://.",
    "tls.certificate": "Renew the certificate, for this host name, from an authority that the trainer's machine trusts.",
    "tls.version": "Enable TLS 1.2 or newer on the server.",
    "tls.expires_soon": "Renew the certificate before the job ends: once it has expired, every request is refused.",
    "timeout": "Make the service faster, send fewer samples at once (batch.max_samples), or raise timeouts.attempt and timeouts.read.",
    "deadline": "Raise timeouts.deadline, or make the service faster.",
    "http_401": "Give the secret that the service checks signatures with, or the header that it asks for.",
    "http_403": "Give the secret or the header that the service asks for.",
    "http_404": "Check the path of the URL.",
    "http_405": "Check the path of the URL: it must take POST.",
    "http_400": "See the answer under exchange. If the service needs columns, probe it with samples of your own.",
    "http_422": "See the answer under exchange. If the service needs columns, probe it with samples of your own.",
    "http_429": "Let the service take more requests, or lower limits.concurrency or set limits.rps.",
    "http_413": "Raise the server's limit on request bodies, or lower batch.max_samples and batch.max_bytes.",
    "contract.content_type": "Answer with content-type: application/json. A login page or a proxy may have answered in its place.",
    "contract.content_encoding": "Do not compress answers; a proxy may do it for you unless told not to.",
    "contract.length": "Return one reward for each sample, in their order.",
    "contract.ids": "Return each sample's id exactly once, or the plain list rewards.",
    "contract.nonfinite": "Report a completion that cannot be scored as an error or a skip; NaN and Infinity are no rewards.",
    "contract.range": "Keep rewards within ±1e6; something else than a reward was sent.",
    "contract.json": "Send valid JSON, and nothing before or after it.",
    "contract.request_mismatch": "Echo the request's own request_id; an answer for another request may come from a cache.",
    "contract.signature": "Sign answers with the endpoint's secret, or set require_signed_responses to false.",
    "contract.status": "Answer with 200 at once, or set reply to either if results come later.",
    "contract.size": "Send less: an answer has at most 8 MiB.",
    "contract.poll_url": "Give a poll_url on the service's own origin, or post to the callback that the request offers. "
    "`dar reward check URL` offers one to services of the same machine alone: register any other, and check it by its rwe_ id.",
    "samples.unscored": "If the service needs columns such as ground_truth, probe it with samples of your own.",
    "samples.failed": "See why the service reported an error for this sample.",
    "samples.skipped": "A skipped sample is not trained on. Probe with samples that the reward applies to.",
    "determinism.same_id": "Keep answers by webhook-id for some minutes: an answer that is lost on the way is asked for again, and may "
    "then differ.",
    "determinism.random": "Make the score a function of the completion alone: temperature 0 for a judge, fixed seeds. Noise trains "
    "on nothing.",
    "order.position": "Look up each sample's result by its id; do not let a sample's place in a request change its score.",
    "order.batch": "Score each sample on its own: which others share its request changes from step to step.",
    "load.errors": "Lower limits.concurrency to what the service can take, or give the service more capacity.",
    "load.throttled": "Lower limits.concurrency as suggested, or have the service's own rate limit raised.",
    "load.slow": "Raise timeouts.attempt as suggested, or lower batch.max_samples: some requests will be cut off.",
    "load.queueing": "Lower limits.concurrency as suggested: further requests only wait inside the service. Or give it more capacity.",
    "signature.unverified": "Verify webhook-signature (dar.rewards.server does, and every Standard Webhooks library can); whoever "
    "finds the URL can use the service now.",
    "signature.crash": "Answer a request whose signature does not fit with 401.",
    "text.failed": "Have the service score any text, or report an error for that sample alone: models write everything at times.",
    "spread.constant": "If completions of your task get the same reward as well, nothing is learned. Probe with a good and a bad "
    "completion of your own.",
    "spread.noise": "With two completions per prompt (K = 2), noise decides which one is better: make the reward less noisy, draw more "
    "completions per prompt, or set combine.tie_eps to about the noise.",
    "async.no_result": "Post the result to reply.callback.url with its token before reply.deadline, or answer polls; the callback URL "
    "must be reachable from the service.",
    "async.not_consumed": "Tell the operator of this installation: a second callback must be answered with duplicate.",
    "unfinished": "Probe again with more time, or find out why the service is so slow.",
}  # fmt: skip
BY_PREFIX = {
    "http_5": "See the service's own log: it failed while it answered.",
    "http_4": "See the answer under exchange; the service refuses the request.",
    "contract.": "Correct the answer: docs/rewards.md has the format.",
    "tls.": "Correct the server's TLS settings.",
    "config.": "Correct the component.",
    "service.": "See why the service reported an error for this sample.",
}


def advice_for(code: str) -> str:
    """What to do about a finding with this code; empty where nothing general can be said."""
    if code in ADVICE:
        return ADVICE[code]
    return next((text for prefix, text in BY_PREFIX.items() if code.startswith(prefix)), "")
