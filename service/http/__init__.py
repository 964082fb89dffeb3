"""What routes share.

auth: API keys, scopes and attempt tokens.
bodies: reading and parsing request bodies.
downloads: sending files and byte ranges.
errors: renders every error.
log: JSON log lines and request ids.
rate_limits: limits by user and address.
"""
