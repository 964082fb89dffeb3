"""The ``dar`` command.

main: the declaration of all commands and options.
up: ``dar up``, everything on one machine.
reward: ``dar reward``, for authors of reward services.
"""
