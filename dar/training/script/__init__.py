"""``dar train``: a training run from a command line.

main: the command, its signals and exit codes.
flags: options of the command line and of YAML files.
assembly: makes a trainer from these options.
dry_run: the output of ``--dry_run``.
"""
