"""Submission of jobs.

submission: check, probe, store; repeated requests by ``Idempotency-Key`` return the same job.
validation: the same checks without a submission, all problems at once.
estimates: what a job would take: completions, requests to reward services and time.
ingredients: hashes of the code, data and model that a job was submitted with.
copies: jobs made from another one: forks and reruns.
datasets: checks of training files at upload, and of their columns at submission.
models: models that a job may start from, and which hub ids are allowed.
model_checks: what the files of an installed model rule out: context, chats, targets of adapters.
memory: the least memory of a job, by arithmetic from these files.
memory_peak: the most memory of a job, by its model's config.json.
"""
