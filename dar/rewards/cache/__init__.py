"""Rewards of earlier requests.

cache: keys of samples, which results are kept, and calls for equal samples that share a request.
store: an SQLite file with size limit, maximum age and repair, or memory.
"""
