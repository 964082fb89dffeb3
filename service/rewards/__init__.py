"""What the service itself does with reward services.

endpoints: the endpoints that components name: fields at submission, URL and secrets at the lease.
probing: full probes on request, light probes before a job is accepted.
watch: probes the services of jobs that are paused for missing rewards, and resumes them.
"""
