"""``dar reward``: commands for authors of reward services.

main: the commands and their options.
check: ``dar reward check``: from the options to a probe.
screen: a probe's report in a terminal.
listener: an HTTP listener for callbacks during a check.
secret: ``dar reward rotate-secret``: a new secret for a project's requests.
serve: ``dar reward serve``: serves a Python function as a reward service.
"""
