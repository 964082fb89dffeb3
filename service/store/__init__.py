"""The database: SQL only, one module for each kind of object.

database: engine, transactions and clock; the only module that commits.
tables: table classes.
columns: base class and column types of the tables.
reward_tables: table classes of reward endpoints and requests.
paging: keyset pagination.
transitions: the states of a job and all moves between them.
fence: checks that an attempt still runs its job.
jobs: submission, reading, cancelling, pausing and resuming.
leases: claims, heartbeats and expiry.
outcomes: the end of an attempt, and what follows for its job.
rows: rows that a trainer sends.
checkpoints: announced, available and removed checkpoints.
events: events of a job.
files: uploaded files.
keys: API keys and their project.
metrics: metrics of a job.
samples: completions of a job that were kept.
reward_endpoints: registered reward services.
reward_failures: failed requests to reward services.
reward_pauses: jobs that are paused until their reward service is back.
reward_requests: reward requests whose results may come later.
reward_secrets: encrypted secrets of reward endpoints.
"""
