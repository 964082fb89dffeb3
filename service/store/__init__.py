"""The database: SQL only, one module for each kind of object.

database: engine, transactions, clock and retries of busy transactions; only it commits.
postgresql: the engine of a PostgreSQL database, with a limit on each wait for an answer.
tables: table classes.
columns: base class and column types of the tables.
reward_tables: table classes of reward endpoints and requests.
paging: keyset pagination.
transitions: the states of a job and all moves between them.
fence: checks that an attempt still runs its job; rejects writes of earlier attempts.
jobs: submission, reading, cancelling, pausing and resuming.
job_filters: which jobs a list shows.
job_changes: labels and limits that a user changes.
submission_claims: submissions without a key, so that a try and its retries make one job.
leases: which queued job is claimed, how long a lease is valid, when it has expired.
outcomes: what follows the end of an attempt: success, retry after a wait, too many attempts.
workers: who workers are, whether they can run jobs, and what an operator has ordered.
poison: when a job is given up, because its attempts fail by its own fault.
stops: jobs that end early, by request or at a limit, with the model that they have.
rows: rows that a trainer sends, each stored once; progress of the job.
pace: how fast the steps of a job are, and when it will end.
rewinds: which rows of an attempt are not the job's, as it went on or ended at an earlier step.
checkpoints: announced, available and removed checkpoints, and which are kept.
best_checkpoint: which checkpoint of a job is the best, and which its result.
deletion: jobs, checkpoints and models that a user deletes.
retention: what is older or larger than the settings allow, and the rows of deleted jobs.
events: events of a job.
files: uploaded files.
file_uploads: files that arrive in parts.
keys: API keys and their project.
promotions: names that users give to checkpoints.
project_secrets: secrets that sign requests to inline reward URLs, one for each project.
metrics: metrics of a job.
metric_rollups: extremes of metrics in buckets of steps, for charts of long jobs.
logs: the ends of trainers' logs.
samples: completions of a job that were kept.
reward_endpoints: registered reward services.
reward_failures: failed requests to reward services.
reward_pauses: jobs paused for missing rewards, and when their service is probed next.
reward_requests: reward requests whose results may come later.
reward_secrets: encrypted secrets of reward endpoints.
"""
