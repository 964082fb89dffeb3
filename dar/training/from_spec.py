"""`train_job`: trains a job from its spec and files to its last checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from dar.errors import InvalidRequestError, RewardBudgetError, RewardUnavailableError, TrainingError
from dar.protocol.hub_data import HubData
from dar.protocol.spec import DARSpec, JobSpec
from dar.rewards.from_spec import RewardAccess
from dar.training.config.config import OPTIMIZERS, SCHEDULERS, DARConfig
from dar.training.data.hub import load_hub_rows, load_saved_rows
from dar.training.data.load_errors import NO_MEMORY, is_lack_of_memory
from dar.training.data.rows import Rows, read_rows
from dar.training.model import adapters, loading
from dar.training.parallel.launch import strategy_options
from dar.training.report.sink import Control, Sink
from dar.training.trainer import DARTrainer

Ending = Literal["finished", "drained", "cancelled"]

RENAMED = {"batch_size", "max_steps", "n_epochs", "lr_scheduler_type", "optim"}
"""Hyperparameters of a job spec that `DARConfig` has by another name."""
CHECKPOINT_SECONDS = 300.0
"""Time of training between two checkpoints if the spec does not say how often."""


@dataclass(frozen=True)
class JobInputs:
    """Everything a job needs; files are on this machine."""

    job_id: str
    spec: JobSpec
    seed: int
    total_steps: int
    model: str | Path
    """Folder or hub id of the base model."""
    adapters: tuple[Path, ...]
    """Adapters that are merged into the model, in order, before anything else."""
    training_file: Path | None
    """JSON Lines, or a folder of `dar.training.data.hub.save_rows`; None: the spec names a data set
    of the hub."""
    work_dir: Path
    """Checkpoints are published in it as ``checkpoints/step-<n>``."""
    resume_from: Path | None
    """A checkpoint of this job."""
    reward_secret: str | None
    threads: int
    offline: bool
    """Whether access to the model hub is forbidden."""
    validation_file: Path | None = None
    """JSON Lines of prompts; None: no evaluation."""
    reward_access: RewardAccess = field(default_factory=RewardAccess)
    """How its reward services are reached."""
    reward_models: Mapping[str, Path] = field(default_factory=dict)
    """Folders of reward models by component name; the others come from the hub."""
    hub_token: str | None = field(default=None, repr=False)
    """Token of the hub; None: that of this machine's user, if there is one."""


def train_job(inputs: JobInputs, sink: Sink, control: Control) -> Ending:
    """Train a job to its end, or until ``control`` requests a stop.

    Returns:
        ``finished``: the checkpoint of the last step is on disk. ``drained``: a checkpoint of the
        last finished step is on disk, unless no step was done since the start. ``cancelled``:
        nothing was written.

    Raises:
        TrainingError: The spec, the model or the data cannot work, or training diverged.
        InvalidRequestError: A row or a parameter is wrong.
        RewardMisconfiguredError: The reward service rejects requests permanently.
        RewardContractError: The reward service breaks its contract.
        RewardUnavailableError: The reward service could not be reached from the start.
        RewardBudgetError: It cannot be reached any more, or too few completions got a reward. As
            with every `RewardError`, a checkpoint of the last finished step is on disk, if any step
            was done since the start.
    """
    _prepare_process(inputs.threads)
    sink.phase("starting", 0, "loading the model")
    trainer: DARTrainer | None = None
    try:
        trainer = build_trainer(inputs, sink, control)
        trainer.train(resume_from_checkpoint=inputs.resume_from)
    except RewardUnavailableError as error:
        if (step := _steps_done(trainer)) == 0:
            raise
        raise RewardBudgetError(
            f"after step {step}: {error.message}",
            code=error.error_code,
            is_outage=True,
        ) from error
    except (MemoryError, RuntimeError) as error:
        has_begun = _steps_done(trainer) > 0 or inputs.resume_from is not None
        if has_begun or not is_lack_of_memory(error):
            raise  # earlier steps fitted into the memory, so another attempt may succeed
        size = NO_MEMORY.search(str(error))
        how_much = "" if size is None else f" (it {size[0][0].lower()}{size[0][1:]})"
        raise TrainingError(
            f"the job does not fit into the worker's memory{how_much}; use a smaller model or "
            "train an adapter (peft), or lower batch_size, dar_k or max_new_tokens",
            code="out_of_memory",
        ) from error
    endings: dict[str | None, Ending] = {
        "cancel": "cancelled",
        "drain": "drained",
        "stop": "drained",
    }
    return endings.get(trainer.stopped_by, "finished")


def _steps_done(trainer: DARTrainer | None) -> int:
    return 0 if trainer is None else int(trainer.state.global_step)


def build_trainer(inputs: JobInputs, sink: Sink, control: Control) -> DARTrainer:
    """The trainer of a job, with its model loaded.

    Raises:
        TrainingError: The model cannot be loaded.
        InvalidRequestError: A row or a parameter is wrong.
    """
    spec = inputs.spec.dar
    config = job_config(inputs)
    # Trained weights stay in float32. Under an adapter they are frozen, so half the size is enough.
    half = config.half if spec.peft is not None else None
    model = loading.load_model(
        inputs.model,
        dtype=half or torch.float32,
        is_offline=inputs.offline,
        token=inputs.hub_token,
    )
    tokenizer = loading.load_tokenizer(
        inputs.model, is_offline=inputs.offline, token=inputs.hub_token
    )
    trainer = DARTrainer(
        loading.merge_adapters(model, inputs.adapters),
        config,
        training_rows(inputs),
        spec.rewards,
        reward_model=inputs.reward_models or None,
        reward_secret=inputs.reward_secret,
        reward_access=inputs.reward_access,
        processing_class=tokenizer,
        peft_config=None if spec.peft is None else loading.lora_config(spec.peft),
        eval_dataset=_validation_rows(inputs),
        sink=sink,
        control=control,
        base_name=_base_name(inputs),
        job_id=inputs.job_id,
        is_offline=inputs.offline,
    )
    trainer.remove_callback(PrinterCallback)  # it prints every report to stdout
    return trainer


def _base_name(inputs: JobInputs) -> str:
    """What the published files call the base model.

    Nobody but this installation has a model under the name of one of its folders, or the weights
    that it has made itself. A hub id is the one name with a slash, wherever its files are.
    """
    name = inputs.spec.model
    return name if "/" in name or name == inputs.model else adapters.published_base(name)


def training_rows(inputs: JobInputs) -> Rows:
    """The training data of a job, from its file or from the hub.

    Raises:
        TrainingError: The hub has no such data set.
        InvalidRequestError: A line of the file is not a row.
    """
    if inputs.training_file is not None:
        is_saved = inputs.training_file.is_dir()
        return (load_saved_rows if is_saved else read_rows)(inputs.training_file)
    return load_hub_rows(
        HubData.parse(inputs.spec.training_file), is_offline=inputs.offline, token=inputs.hub_token
    )


def _validation_rows(inputs: JobInputs) -> Rows | None:
    evaluation = inputs.spec.dar.evaluation
    if evaluation is None:
        return None
    if inputs.validation_file is None:
        raise InvalidRequestError(
            "the job evaluates, but its validation file is missing", param="validation_file"
        )
    return read_rows(inputs.validation_file, "validation_file")[: evaluation.max_prompts]


def job_config(inputs: JobInputs) -> DARConfig:
    """A job spec as arguments of the trainer."""
    spec = inputs.spec.dar
    hyper, sampling = spec.hyperparameters, spec.sampling
    every = spec.checkpointing.every_steps
    config = DARConfig(
        output_dir=str(inputs.work_dir),
        preset=spec.preset,
        **hyper.model_dump(exclude=RENAMED),
        **sampling.model_dump(),
        per_device_train_batch_size=hyper.batch_size // spec.resources.processes,
        **strategy_options(spec.resources),
        max_steps=inputs.total_steps,
        lr_scheduler_type=SCHEDULERS.get(hyper.lr_scheduler_type, hyper.lr_scheduler_type),
        optim=OPTIMIZERS.get(hyper.optim, hyper.optim),
        chat_template_kwargs=spec.chat_template_kwargs,
        overlap=spec.overlap,
        order=spec.order,
        bf16=_is_bf16(spec),
        fp16=_is_fp16(spec),
        eval_strategy="no" if spec.evaluation is None else "steps",
        eval_steps=None if spec.evaluation is None else spec.evaluation.every_steps,
        use_cpu=not torch.cuda.is_available(),
        seed=inputs.seed,
        save_strategy="steps",
        save_steps=every or inputs.total_steps,  # the last step always gets a checkpoint
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        hub_token=inputs.hub_token,
    )
    config.counted_epochs = (hyper.n_epochs or 1.0) if hyper.max_steps is None else None
    config.saves_in_background = True
    config.saves_evaluated = spec.checkpointing.keep_best and spec.evaluation is not None
    config.checkpoint_seconds = CHECKPOINT_SECONDS if every is None else None
    return config


def _is_bf16(spec: DARSpec) -> bool:
    has_gpu = torch.cuda.is_available()
    is_supported = not has_gpu or torch.cuda.is_bf16_supported()
    if spec.precision == "bf16" and not is_supported:
        raise TrainingError(
            "this GPU has no bfloat16; send precision fp32 or auto", param="method.dar.precision"
        )
    return spec.precision == "bf16" or (spec.precision == "auto" and has_gpu and is_supported)


def _is_fp16(spec: DARSpec) -> bool:
    if spec.precision == "fp16" and not torch.cuda.is_available():
        raise TrainingError(
            "precision fp16 needs a GPU, and this worker has none; send bf16, fp32 or auto",
            param="method.dar.precision",
        )
    return spec.precision == "fp16"


def _prepare_process(threads: int) -> None:
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
