"""The Python SDK: files, jobs, checkpoints, models and reward endpoints of a DAR service.

import dar

client = dar.Client()
file = client.files.create("prompts.jsonl")
job = client.jobs.create(model="my-model", training_file=file.id, method={...})
job = client.jobs.wait(job.id, on_progress=lambda job: print(job.progress.step))
checkpoint = next(iter(client.checkpoints.list(job.id)))
client.checkpoints.download(job.id, checkpoint.id, "weights/")
"""

from dar.client.client import Client
from dar.client.paging import Listing

__all__ = ["Client", "Listing"]
