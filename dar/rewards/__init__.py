"""Reward sources, from a function or a reward service to one reward per sample.

base: the interfaces and types of all sources; removes thinking from completions.
threads: blocking functions from coroutines, and coroutines from blocking code.
http: one request to a reward service: retries, breaker, limits, egress, signature.
protocols: what requests and answers look like, `dar.reward.v1` and others.
cache: rewards of earlier requests.
functions: Python functions as sources.
builtins: rewards that need no service, by name.
http_reward: a reward service as a source; options of a component for its requests.
scoring: the results of several sources become one reward; failure policy and failure budget.
from_spec: from the ``rewards`` of a job spec to a scorer, and their checks at submission.
probe: a dry run of a reward service, with a report and advice.
server: serves a reward function as a reward service.
"""
