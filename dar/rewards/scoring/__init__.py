"""Several sources scored and combined.

scorer: the interface of a trainer to its sources: submit a group, collect its rewards.
in_flight: groups being scored, beside the thread that trains; waits, and cancels what is stopped.
combine: results of several components as one reward: clip, weight, gates, skipped samples.
normalize: rewards of a component normalised before they are weighted; running moments.
failures: the policy for samples and groups without rewards, and the failure budget that ends a job.
step_report: requests summed up per step: latency, failures, waits, as metrics and events.
"""
