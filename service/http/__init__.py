"""What routes share.

auth: API keys, scopes and attempt tokens.
bodies: reads, limits, unpacks and parses request bodies.
connections: time limits of connections, and how many there may be.
downloads: sends files and byte ranges.
errors: renders every error as JSON, with its ``Retry-After``.
forms: multipart forms whose file is written to where it is kept.
log: JSON log lines and request ids.
rate_limits: limits by user and address, with ``Retry-After`` for clients; recently passed probes.
"""
