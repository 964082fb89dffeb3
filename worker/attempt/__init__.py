"""One attempt, seen from the trainer process.

inbox: asynchronous rewards over stdin and a pipe.
main: reads the launch, trains, reports, exits.
siblings: the other processes of a trainer that uses several.
"""
