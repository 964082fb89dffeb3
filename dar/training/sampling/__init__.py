"""Sampling from the policy.

prompts: the prompts of each step.
sampler: completions, with their log-probabilities.
"""
