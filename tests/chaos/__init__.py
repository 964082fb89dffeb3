"""The chaos suite: real processes are killed, frozen and cut off, and nothing may be lost.

``make chaos`` runs it; docs/chaos.md has its results. Only the training is scripted, except in the
row that trains.

stack: an installation whose processes are restarted when they die.
submitter: clients that submit, retry, and write down what was acknowledged.
books: what the database says at the end: lost, doubled, unequal, and what the auditor finds.
submissions: rows in which services are killed while jobs are submitted.
kills: rows in which workers and trainers are killed.
instants: rows in which processes are killed at the instants that the code marks.
freezes: rows in which workers are frozen beyond their lease, with the fence on and off.
outages: rows in which the broker, the database, the service or the disk is away.
buckets: rows in which the bucket of all files is away, full, slow or read-only.
latencies: rows that measure how soon a cancelled or drained job leaves its slot.
training: the row that trains, and compares weights bit by bit.
histories: random orders of messages, compared with a model.
unfenced_service: a service without the fence, to show that the suite would notice.
scoreboard: rows and their results; writes docs/chaos.md.
__main__: runs rows.
"""
