"""Submission of jobs.

submission: check, probe, store.
datasets: checks of training files.
models: models that a job may start from.
"""
