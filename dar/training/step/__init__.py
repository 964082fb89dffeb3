"""An optimizer step: sampled, scored, weighed, trained on and reported.

loop: one step for transformers' loop: passes, gradients, norm, empty steps, divergence.
pipeline: when a step is sampled: at its start, or one step ahead.
online: completions are sampled from the policy and submitted for scoring.
offline: completions and rewards are read from the data set.
reward_feed: waits for the rewards of a step, and samples again where too many are missing.
trained_steps: counts the steps that changed the model.
passes: log-probabilities under policy and reference, shared among the processes.
records: the completions of a step, compared and weighed in their groups.
degenerate: a warning when rewards are constant, or all completions truncated or skipped.
learning: a warning when alpha + beta does not fit the size of the rewards.
metrics: computes the metrics and samples of a step, and reports them.
"""
