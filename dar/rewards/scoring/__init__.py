"""Several sources scored and combined.

combine: the results of several components as one reward.
failures: the failure policy of a group, and the failure budget of a job.
in_flight: groups being scored.
normalize: rewards normalised before they are weighted.
scorer: the interface of a trainer to its sources.
step_report: requests summed up per step, as metrics, rows and events.
"""
