"""The ``dar`` command.

main: the commands and their options.
up: ``dar up``, service, Valkey and workers on one machine.
launch: commands that replace this process by a service, a worker or the training script.
reward: ``dar reward``, for authors of reward services.
"""
