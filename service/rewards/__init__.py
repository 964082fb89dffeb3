"""What the service itself does with reward services.

endpoints: fields and access of registered endpoints, for the components that name them.
probing: full probes on request, and light probes before a job is accepted.
watch: resumes jobs that are paused for missing rewards.
"""
