"""HTTP routes, one module for each kind of object.

jobs: submit, read, cancel, pause and resume jobs.
job_filters: query parameters that say which jobs a list shows.
attempts: attempts of a job, and whose fault each failure was.
events: events of a job, also as a long poll.
stream: all events of a job as server-sent events.
logs: the ends of trainers' logs.
metrics: metrics of a job, as columns or tables, and of several jobs.
samples: completions of a job that were kept.
checkpoints: checkpoints of a job and their files, for users.
files: uploaded training files.
file_validation: what is in a stored training file, and what it can be used for.
file_uploads: training files that users send in parts.
models: models that a job may start from.
graders: graders in OpenAI's shape.
reward_endpoints: registered reward services: create, change, rotate secrets, probe.
reward_secret: the secret of a project for requests to inline reward URLs.
reward_stats: totals and failed requests of a job's rewards.
reward_callbacks: results that reward services post later, authorized by a token per request.
reward_requests: reward requests that a worker announces.
workers: the workers of the installation, and orders of an operator.
leases: a worker's claims, heartbeats, directives, rows and outcomes.
inputs: files that a worker downloads for its attempt.
uploads: checkpoints that a worker uploads: announced, sent in parts, verified.
health: liveness, readiness and Prometheus metrics.
retention: what would be deleted by age and size.
api_keys: API keys, for operators: made, listed and revoked.
paging: query parameters and envelope of lists.
query: strict query and path parameters.
"""
