"""Rewards of earlier requests.

cache: keys of samples, and calls that share a request.
store: storage in SQLite.
"""
