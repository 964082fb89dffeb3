"""Reward sources, from a function or a reward service to one reward per sample.

base: the interface of all sources, and removal of thinking.
threads: blocking functions from coroutines, and coroutines from blocking code.
http: one request to a reward service and all that limits it.
protocols: what requests and answers look like.
cache: rewards of earlier requests.
functions: Python functions as sources.
builtins: functions of this package.
http_reward: a reward service as a source.
scoring: several sources combined for a trainer.
from_spec: the scorer of a job spec.
probe: checks of a reward service.
server: a reward function as a service.
"""
