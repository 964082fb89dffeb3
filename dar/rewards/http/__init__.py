"""Requests to reward services.

async_results: results after a 202, by callback or polling.
batching: groups of concurrent calls in shared requests, and the bounded queue.
breaker: the circuit breaker.
connection: the network connection below the pool, and timings of an attempt.
dns: host names, resolved in threads.
egress: which addresses may be reached.
endpoint: connections, concurrency, rate, ``Retry-After``, breaker and budget of a URL.
redaction: secrets removed from texts.
request: one request with its attempts, from samples to results, and its log.
responses: which answer or error means which failure.
retry: which failures are retried, when, and how many per endpoint.
signing: signatures of Standard Webhooks.
wire: samples as JSON, batches and request ids.
"""
