"""One attempt, seen from the worker: everything around the trainer process.

checkpoints: upload of published checkpoints.
child_process: start, stdin, signals and end of the trainer process.
heartbeat: renewal of the lease, and directives of the service.
inputs: download of training file, model, adapters and resume checkpoint.
outcome: what to report when the trainer has ended.
reward_bridge: announces reward requests of the trainer, forwards results to it.
reward_caches: caches of rewards on this host, and their removal.
sender: sends the spool to the service.
state: flags that the threads of an attempt share.
stopping: cancels, pauses, drains or kills the trainer.
supervisor: the attempt from its lease to its report.
"""
