"""The worker: claims jobs, supervises their trainers, reports to the service.

app: the worker process: Celery wakes the slot, or the slot polls; signals of the process.
slot: claims jobs and runs one after the other.
api: client of the service's worker API; repeats calls while the service is away.
store_client: client of the artifact store, for files that do not pass through the service.
supervisor: one attempt, seen from the worker.
attempt: one attempt, seen from the trainer process; the only folder here that uses torch.
models: models on this host, from its own folders, its cache, the service or a hub.
failures: whose fault a failed attempt is, and the sentence about it that the user reads.
launch: messages between supervisor and trainer, and the trainer's exit codes.
spool: rows on disk until the service has committed them; JSON without NUL.
folders: the layout of the work directory.
identity: node, slot, machine and start of the worker; the lock of a slot.
self_check: whether this machine can run jobs, and what the worker reports about it.
cleanup: after a crash: sends leftover rows, kills leftover trainers, removes folders.
"""
