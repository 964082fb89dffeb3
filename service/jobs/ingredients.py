"""What a job was submitted with, as hashes: the code, the data and the model."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dar import version
from dar.protocol.job_config import JobConfig, JobIngredients
from service.jobs.model_checks import ModelFiles
from service.store import checkpoints
from service.store.database import Transaction
from service.store.tables import JobRow


@functools.cache
def code_sha256() -> str:
    """Digest of the Python files of the package ``dar``, which has all code that trains."""
    root = Path(version.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def of_model(model: ModelFiles | None) -> str | None:
    """Digest of a model's config.json, of its files' names and sizes, and of its tensors' shapes.

    The weights themselves are not read: that takes minutes. None: a hub model.
    """
    if model is None:
        return None
    names = model.matching("*.safetensors")
    facts = {
        "config": model.config,
        "files": model.sizes(),
        "tensors": {name: model.header(name) for name in names},
    }
    return _digest(facts)


def of_job(
    transaction: Transaction, job: JobRow, file_sha256: Mapping[str, str], model: str | None
) -> JobIngredients:
    """The hashes of a job that is being stored.

    Args:
        transaction: Where the checkpoints of its model are read.
        job: The job.
        file_sha256: Digests of its files, by the name of their field.
        model: What `of_model` gives for its model.
    """
    source = job.model_source
    whole = [source["checkpoint_id"]] if source["checkpoint_id"] else []
    ids = [*whole, *source["adapter_ids"]]
    found = checkpoints.by_ids(transaction, ids) if ids else {}
    return JobIngredients(
        version=version.__version__,
        code_sha256=code_sha256(),
        training_file_sha256=file_sha256.get("training_file"),
        validation_file_sha256=file_sha256.get("validation_file"),
        model_sha256=model,
        checkpoint_sha256={one.id: one.manifest_sha256 for one in found.values()},
    )


LEFT_OUT = ("metadata", "suffix", "skip_validation")
"""Fields of a spec that change nothing of what is trained."""


def config_of(job: JobRow) -> JobConfig:
    """What a job is made of, as far as it is known."""
    spec = job.parsed_spec.model_dump(mode="json")
    spec |= {"seed": job.seed, "metadata": job.labels}
    decisive = {name: value for name, value in spec.items() if name not in LEFT_OUT}
    dar_spec = {name: value for name, value in spec["method"]["dar"].items() if name != "limits"}
    facts = {
        "spec": decisive | {"method": {**spec["method"], "dar": dar_spec}},
        "model_source": job.model_source,
        "ingredients": job.ingredients,
    }
    made = None if job.ingredients is None else JobIngredients.model_validate(job.ingredients)
    return JobConfig(
        object="fine_tuning.job.config",
        job_id=job.id,
        spec=spec,
        total_steps=job.total_steps,
        model_source=job.model_source,
        ingredients=made,
        config_sha256=_digest(facts),
    )


def _digest(facts: Mapping[str, Any]) -> str:
    # A damaged model may have integers of any length, which orjson refuses.
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
