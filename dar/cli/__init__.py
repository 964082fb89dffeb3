"""The ``dar`` command.

main: the commands and their options.
up: ``dar up``, service, Valkey and workers on one machine.
keys: ``dar keys``, API keys of users and workers.
reward: ``dar reward``, for authors of reward services.
"""
