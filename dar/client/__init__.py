"""The Python SDK: files, jobs, checkpoints, models and reward endpoints of a DAR service.

import dar

client = dar.Client()
file = client.files.create("prompts.jsonl")
job = client.jobs.create(model="my-model", training_file=file.id, method={...})
job = client.jobs.wait(job.id, on_progress=lambda job: print(job.progress.step))
checkpoint = next(iter(client.checkpoints.list(job.id)))
client.checkpoints.download(job.id, checkpoint.id, "weights/")

client: `Client`, with one attribute per kind of object.
async_client: `AsyncClient`, its twin for programs with an event loop.
asynchronous: how a method gets its asynchronous twin.
api_keys: API keys of users and workers.
arguments: ids, lists, mappings and files given to methods, as the service takes them.
transport: HTTP requests, their errors, retries and ``Retry-After``; the worker uses it too.
checkpoints: checkpoints of a job.
download: download of a checkpoint's files, resumed after a break and verified by SHA-256.
files: training files.
jobs: jobs, their metrics, samples and events; `wait` for the end of a job.
models: models that a job may start from.
paging: lists that fetch their pages while they are iterated.
reward_endpoints: registered reward services.
reward_secret: the secret for requests to reward services that jobs name by URL.
stream: the stream of a job, opened again after a break.
uploads: training files that are sent in parts.
waiting: following a job by polling: until it ends, its new metrics, its growing log.
workers: workers of the installation.
"""

from dar.client.async_client import AsyncClient
from dar.client.asynchronous import AsyncListing
from dar.client.client import Client
from dar.client.paging import Listing
from dar.client.waiting import Following

__all__ = ["AsyncClient", "AsyncListing", "Client", "Following", "Listing"]
