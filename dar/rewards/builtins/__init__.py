"""Rewards that this package computes itself: pure functions of a sample, each described by the parameters that a job may send.

All take time in proportion to the text they read, the regular expression included: no completion can hang a job, and no
time limit makes a reward depend on how busy a machine is.
"""
