"""The HTTP service: jobs, files, models and reward endpoints.

app: the application, and what starts and stops with it.
runtime: what the routes and threads of a process share.
installation: settings, database and keys.
artifacts: files of uploads and checkpoints.
secret_box: encrypts the secrets of reward endpoints.
keys: makes and configures API keys and secrets.
migrate: upgrades the database schema.
telemetry: Prometheus metrics.
__main__: the commands serve, migrate and rotate-secrets.
"""
