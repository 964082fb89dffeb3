"""Sampling from the policy.

prompts: which prompts a step takes, in which order.
sampler: the decoding loop: temperature, filters, stop texts, log-probabilities of completions.
"""
