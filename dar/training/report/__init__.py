"""What a trainer reports.

sink: the interfaces of reports, and of requests to stop.
console: reports on a terminal.
drift: a warning when a component's rewards jump.
trackers: names of trackers (`report_to`), and errors of their start.
capacity: a warning when a reward service is too slow, with the concurrency it needs.
"""
