"""An optimizer step: sampled, scored, weighed, trained on and reported.

loop: the steps of a run, as transformers' training loop goes through them.
pipeline: when steps are sampled, maybe one ahead.
online: completions are sampled and scored.
offline: completions and rewards are read from the data set.
reward_feed: rewards as they arrive, and the parts of a step that are trained on meanwhile.
passes: log-probabilities under policy and reference, shared among the processes.
records: the completions of a step and their weights.
metrics: metrics and samples of a step, and reports of them.
"""
