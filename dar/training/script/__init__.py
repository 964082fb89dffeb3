"""``dar train``: a training run from a command line.

main: the command and its signals.
arguments: options of the command line and of YAML files, and their values.
flags: the parser of these options, with their help.
usage: refuses a wrong command line at once, without that parser.
places: files and folders that a command line names; an earlier run is not overwritten.
run_lock: the lock of an output folder, in which one run at a time writes.
exits: exit codes, and errors in the words of the flags.
assembly: makes a trainer from these options.
dry_run: the output of ``--dry_run``.
forecast: the output of ``--forecast``, which is ``dar forecast``.
"""
