"""Builtin rewards: pure functions of a sample, described by the parameters that a job may send.

All take time in proportion to the text they read, regular expressions included: no completion can
block a job, and no reward depends on a time limit.

registry: all builtins by name.
base: what a builtin is, and a builtin as a reward source.
lengths: length of a completion, truncation, repetition.
numbers: compares answers that are numbers.
texts: patterns, exact texts, JSON, tags.
"""
