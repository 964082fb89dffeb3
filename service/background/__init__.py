"""Background work of a process.

notifier: wakes long polls when a job changes.
directives: cursor of the directives' long poll.
feeds: what readers of streams get: the events of their job, read once for all of them.
bounded_checks: checks of other systems that end within a bounded time.
periodic: a thread that makes passes with pauses between them.
reconciler: periodic work: expires leases that were not renewed, removes old checkpoints and files.
scrubber: reads stored checkpoints again, and sets damaged ones aside.
retention: deletes what is too old or too large, and jobs that users have deleted.
waker: wakes workers over the broker.
"""
