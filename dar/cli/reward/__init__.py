"""``dar reward``: commands for authors of reward services.

main: the commands and their options.
check: ``dar reward check``: from the options to a probe.
screen: a probe's report in a terminal.
listener: an HTTP listener for callbacks during a check.
serve: ``dar reward serve``: serves a Python function as a reward service.
"""
