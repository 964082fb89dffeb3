"""One attempt, seen from the trainer process.

main: the trainer process: reads the launch, trains, writes rows, picks the exit code.
inbox: asynchronous rewards over stdin and a pipe.
siblings: the other processes of a trainer that uses several.
"""
