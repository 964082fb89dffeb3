"""Requests to reward services.

request: one request with its attempts: encode, sign, send, time limit, decode.
log: the log of attempts, one line of JSON each.
retry: which failures are retried, the wait before each attempt, ``Retry-After``, the retry budget.
endpoint: shared by all requests to a URL: pool, concurrency, rate, pause after ``Retry-After``.
breaker: the circuit breaker: when it opens, and when it tries again.
batching: groups of concurrent calls in shared requests, and the bounded queue.
responses: which status or network error means which failure; results as rewards.
async_results: results after a 202, by callback or polling.
connection: the network connection below the pool, and timings of an attempt.
dns: host names, resolved in threads.
egress: which addresses may be reached (SSRF).
signing: signatures of Standard Webhooks, made and verified.
redaction: secrets removed from texts; which secret headers are allowed.
wire: samples as JSON, batches by size, and request ids.
"""
