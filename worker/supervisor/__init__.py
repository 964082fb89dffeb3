"""One attempt, seen from the worker: everything around the trainer process.

supervisor: the attempt from its lease to its report, step by step.
heartbeat: renews the lease and notices that it is lost; receives cancel and pause.
state: flags that the threads of an attempt share; what makes an attempt give up.
child_process: start, environment, stdin, signals and end of the trainer process.
stopping: cancels, pauses, drains or stops the trainer: an order, then SIGTERM, then SIGKILL.
watchdog: notices a trainer that makes no progress, and ends it.
outcome: what is reported when the trainer has ended: complete, fail, retry or release.
inputs: downloads training file, model, adapters and resume checkpoint.
row_loading: rows of a hub's data set, loaded before the trainer starts.
sender: sends the spool to the service, in order.
log_sender: sends the end of the trainer's log.
checkpoints: uploads published checkpoints in parts.
reward_bridge: announces reward requests of the trainer, forwards results to it.
reward_caches: caches of rewards on this host, and their removal.
"""
