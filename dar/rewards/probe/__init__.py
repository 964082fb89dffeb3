"""A dry run of a reward service: the requests a job would send, and a report of what is wrong.

run: `probe`, which takes the nine steps in order, within a time limit.
address: step 1, egress policy, name resolution, connection, certificate.
steps: steps 2 to 4 and 6 to 9, the answer, determinism, order, signature, texts, spread, callbacks.
load: step 5, full requests at full concurrency, and the settings that fit.
client: one request through a job's own client; graders and the watch of paused jobs use it too.
callbacks: the in-memory inbox for callbacks of probe requests.
report: findings, the advice for each, and the report.
"""
