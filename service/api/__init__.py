"""Routes: HTTP only, one module for each kind of object.

checkpoints: checkpoints of a job and their files.
events: events of a job.
files: uploaded training files.
graders: graders in OpenAI's shape.
health: liveness, readiness and Prometheus metrics.
inputs: files that a worker downloads for its attempt.
jobs: submit, read, cancel, pause and resume jobs.
leases: a worker's claims, heartbeats, directives, rows and outcomes.
metrics: metrics of a job.
models: models that a job may start from.
paging: query parameters and envelope of lists.
query: strict query and path parameters.
reward_callbacks: results that reward services post later.
reward_endpoints: registered reward services.
reward_requests: reward requests that a worker announces.
reward_stats: totals and failed requests of a job's rewards.
samples: completions of a job that were kept.
uploads: checkpoints that a worker uploads.
"""
