"""The HTTP service: jobs, files, models and reward endpoints.

app: the application, and what starts and stops with it.
openapi: the OpenAPI document.
runtime: what the routes and threads of a process share.
installation: settings, database and keys.
artifacts: files of uploads and checkpoints, by their keys.
storage_owner: makes sure that a service starts only on its own installation's files.
storage: where these files are kept: a folder, or a bucket.
secret_box: encrypts the secrets of reward endpoints.
keys: makes and configures API keys, worker keys and secrets.
migrate: upgrades the database schema.
audit: checks afterwards that nothing was lost, doubled or damaged.
backup: takes backups of an installation that runs, restores them, and moves files elsewhere.
telemetry: Prometheus metrics.
api: routes, one file for each noun.
background: long polls, expired leases, removal of old files, wake-ups of workers.
http: authentication, bodies, errors, rate limits, logs.
jobs: submission of jobs, checks of training files, models.
rewards: registered endpoints, probes, and jobs paused for missing rewards.
store: the database, SQL only, one file for each noun.
__main__: the commands serve, migrate, rotate-secrets, audit, backup, restore and move-storage.
"""
