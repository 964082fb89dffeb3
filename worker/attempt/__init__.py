"""One attempt, seen from the trainer process.

main: the trainer process: reads the launch, trains, picks the exit code.
hub_rows: the process that loads the rows of a hub's data set.
inbox: asynchronous rewards over stdin and a pipe.
spool_sink: rows for everything that a trainer reports; fewer samples if the disk has no room.
log_file: the trainer's log, begun anew when it is large.
siblings: the other processes of a trainer that uses several.
"""
