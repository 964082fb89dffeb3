"""Builtin rewards: pure functions of a sample, described by the parameters that a job may send.

All take time in proportion to the text they read, regular expressions included: no completion can
block a job, and no reward depends on a time limit.

base: what a builtin is, and a builtin as a reward source.
lengths: length, truncation, repetition.
numbers: answers that are numbers.
registry: all builtins by name.
texts: patterns, exact texts, JSON, tags.
"""
