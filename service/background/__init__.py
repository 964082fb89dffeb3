"""Background work of a process.

notifier: wakes long polls.
directives: cursor of the directives' long poll.
reconciler: expires leases and removes what is no longer needed.
waker: wakes workers over the broker.
"""
