"""The ``dar`` command.

launch: commands that replace this process by a service, a worker or the training script.
main: the declaration of all commands and options.
up: ``dar up``, everything on one machine.
reward: ``dar reward``, for authors of reward services.
"""
