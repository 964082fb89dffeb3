"""The worker: claims jobs, supervises their trainers, reports to the service.

api: client of the service's worker API.
app: the worker process: Celery wakes the slot, or the slot polls.
cleanup: rows, processes and folders that earlier attempts left.
folders: the layout of the work directory.
identity: node, slot and start of the worker; the lock of a slot.
launch: messages between supervisor and trainer, and the trainer's exit codes.
slot: claims jobs and runs one after the other.
spool: rows on disk until the service has committed them; JSON without NUL.
supervisor: one attempt, seen from the worker.
attempt: one attempt, seen from the trainer process; the only package that uses torch.
"""
