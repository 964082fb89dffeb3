"""The ``dar`` command.

main: the commands and their options.
up: ``dar up``, service, Valkey and workers on one machine.
reward: ``dar reward``, for authors of reward services.
"""
