"""`ResumableTrainer`: transformers' trainer with checkpoints of our own, whole, verified and without pickles."""

import copy
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from dar.errors import CheckpointError, InvalidRequestError
from dar.protocol.checkpoints import RESUME_FOLDER, Manifest, ManifestFile
from dar.training.checkpoint import checkpoint
from dar.training.checkpoint.fingerprint import environment
from dar.training.checkpoint.hub import HubTrainer
from dar.training.config.config import DARConfig
from dar.training.model.loading import LanguageModel
from dar.training.parallel import deepspeed, deepspeed_config
from dar.training.parallel.ranks import Ranks
from dar.training.parallel.sharding import (
    is_sharded,
    load_whole_optimizer_state,
    whole_optimizer_state,
    whole_weights,
)
from dar.training.report.sink import NullSink, Sink


class ResumableTrainer(HubTrainer):
    """Publishes checkpoints in ``output_dir/checkpoints/step-<n>`` and goes on from one as if nothing had happened.

    Replaces everything by which `transformers.Trainer` saves and loads: it writes in place, chooses the highest number
    instead of a whole checkpoint, and pickles optimizer, scheduler and random states.
    """

    # What transformers' annotations leave open, and is certain here:
    args: DARConfig
    model: LanguageModel
    processing_class: PreTrainedTokenizerBase
    optimizer: Optimizer
    lr_scheduler: LambdaLR
    data_collator: Any
    train_dataset: Any
    deepspeed: Any

    ranks: Ranks = Ranks()
    """The processes that train together. The main one alone writes, and the others wait for it."""
    sink: Sink = NullSink()
    config_sha256: str = ""
    """Digest of everything that decides the result."""
    published_step: int = 0
    """Step of the newest checkpoint that was written or resumed from."""
    _resume: checkpoint.ResumeState | None = None
    _own_folders: tuple[Path, ...] = ()
    """Checkpoints of this run that are still kept, oldest first."""
    _groups: deepspeed.Groups = ()
    """The optimizer's parameter groups, as they were made."""

    def create_accelerator_and_postprocess(self) -> None:
        """Set accelerate up; on CPUs, for which it does not offer FSDP, torch has it all the same.

        Raises:
            InvalidRequestError: The launcher has asked for something that this trainer cannot drive.
        """
        self.args.deepspeed_plugin = copy.deepcopy(self.args.deepspeed_plugin)  # it is changed here
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.is_deepspeed_enabled:
            deepspeed_config.leave_loading_alone()
            if self.args.deepspeed:
                deepspeed_config.forget_launch()
            deepspeed_config.settle(state.deepspeed_plugin.deepspeed_config, self.args)
            deepspeed_config.check_weights(self.model)
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
            raise InvalidRequestError(
                "this trainer drives FSDP of version 2 only; set fsdp_config={'version': 2} (accelerate launch "
                "--fsdp_version 2)",
                param="fsdp_config",
            )

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return Path(str(self.args.output_dir)) / "checkpoints"

    def own_state(self) -> dict[str, Any]:
        """What a subclass has to keep beside transformers' state, as JSON."""
        return {}

    def restore_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""

    def catch_up(self, state: dict[str, Any]) -> None:
        """Do what was left undone at the last step of a run; ``state`` is what `own_state` gave then."""

    def step_values(self) -> dict[str, float]:
        """Metrics of the last step, for the manifest."""
        return {}

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,  # noqa: ANN401 - the signature of transformers
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint folder of a trainer with the same arguments.
            trial: Not used.
            ignore_keys_for_eval: Not used.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to other arguments.
        """
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            raise InvalidRequestError(
                "DeepSpeed has taken this trainer's model, and takes none twice; make another trainer"
            )
        self.ranks.from_main(lambda: checkpoint.sweep(self.checkpoints))
        if not resume_from_checkpoint:
            return super().train(None, trial, ignore_keys_for_eval)
        if isinstance(resume_from_checkpoint, bool):
            raise InvalidRequestError("resume_from_checkpoint must name the checkpoint's folder")
        folder = Path(resume_from_checkpoint)
        manifest = self._open(folder)
        if manifest.step >= self.args.max_steps:
            return self._finish_again(folder, manifest)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not is_sharded(self.model)):
            checkpoint.load_weights(self.model, folder)
        return super().train(str(folder / RESUME_FOLDER), trial, ignore_keys_for_eval)

    def predict(self, *_: Any, **__: Any) -> NoReturn:  # noqa: ANN401 - whatever transformers takes
        """Refuse: there are no labels to predict.

        Raises:
            InvalidRequestError: Always.
        """
        raise InvalidRequestError(
            "predict is for labelled data, which DAR has not; evaluate tries the policy on prompts of their own"
        )

    def _open(self, folder: Path) -> Manifest:
        manifest = Manifest.model_validate(
            self.ranks.from_main(lambda: checkpoint.verify(folder).model_dump(mode="json"))
        )
        if manifest.config_sha256 != self.config_sha256:
            raise CheckpointError(
                f"the checkpoint {folder} was made with other hyperparameters, data or base weights; "
                "resume with the same ones, or start anew from its model"
            )
        self._resume = checkpoint.ResumeState.load(folder)
        if folder.resolve().parent == self.checkpoints.resolve():
            self._own_folders = (self.checkpoints / folder.name,)
        return manifest

    def _finish_again(self, folder: Path, manifest: Manifest) -> TrainOutput:
        """The last step was done before: publish its checkpoint here too, so that whoever waits for it finds it."""
        checkpoint.load_weights(self.model, folder)
        self.state.global_step = manifest.step
        assert self._resume is not None
        self.catch_up(self._resume.trainer)
        self._publish(
            lambda target: checkpoint.copy_files(folder, target, manifest),
            lambda files, last_seq: manifest.model_copy(
                update={"files": files, "last_seq": last_seq}
            ),
        )
        return TrainOutput(manifest.step, math.nan, {})

    # --- writing -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401, ARG002 - as transformers
        weights = whole_weights(self.model) if is_sharded(self.model) else None
        optimizer = self._whole_optimizer_state()
        self._publish(
            lambda folder: self._write_checkpoint(folder, weights, optimizer),
            lambda files, last_seq: Manifest(
                step=self.state.global_step,
                kind="adapter" if isinstance(self.model, PeftModel) else "full",
                last_seq=last_seq,
                config_sha256=self.config_sha256,
                metrics=self.step_values(),
                files=files,
            ),
        )

    def _publish(
        self,
        write: Callable[[Path], None],
        manifest: Callable[[list[ManifestFile], int], Manifest],
    ) -> None:
        self.ranks.from_main(lambda: self._publish_here(write, manifest))
        self.published_step = self.state.global_step

    def _publish_here(
        self,
        write: Callable[[Path], None],
        manifest: Callable[[list[ManifestFile], int], Manifest],
    ) -> None:
        step = self.state.global_step
        self.sink.phase("checkpointing", step)
        last_seq = self.sink.flush()
        published = checkpoint.publish(
            self.checkpoints, step, write=write, manifest=lambda files: manifest(files, last_seq)
        )
        self.sink.checkpoint(step, published.folder, published.manifest, published.manifest_sha256)
        self._push_from_checkpoint(str(published.folder))
        self._keep_last(published.folder)

    def _keep_last(self, newest: Path) -> None:
        """Remove what is beyond the limit; what another run left in the same folder is not ours to remove."""
        folders = (*(folder for folder in self._own_folders if folder != newest), newest)
        excess = len(folders) - (self.args.save_total_limit or len(folders))
        for folder in folders[: max(0, excess)]:
            shutil.rmtree(folder, ignore_errors=True)
        self._own_folders = folders[max(0, excess) :]

    def _whole_optimizer_state(self) -> Mapping[str, Any]:
        if self.is_deepspeed_enabled:
            return deepspeed.whole_optimizer_state(
                self._own_optimizer, self._groups, is_main=self.ranks.is_main
            )
        if is_sharded(self.model):
            return whole_optimizer_state(self.model, self._own_optimizer)
        return self.optimizer.state_dict()

    @property
    def _own_optimizer(self) -> Optimizer:
        """Without what accelerate has put round it."""
        inner: Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner

    def _write_checkpoint(
        self, folder: Path, weights: dict[str, Tensor] | None, optimizer: Mapping[str, Any]
    ) -> None:
        self._save(str(folder), weights)
        self.state.save_to_json(str(folder / RESUME_FOLDER / TRAINER_STATE_NAME))
        checkpoint.save_resume_state(
            folder,
            optimizer,
            self.lr_scheduler.state_dict(),
            {"environment": self._environment(), **self.own_state()},
        )

    def _save_whole(self, output_dir: str | None) -> None:
        # transformers would leave the shards of ZeRO-3 to DeepSpeed, which pickles them
        self._save(output_dir, whole_weights(self.model) if is_sharded(self.model) else None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ANN401 - as transformers
        if not self.ranks.is_main:
            return
        folder = output_dir or str(self.args.output_dir)
        # peft would ask the hub whether the base model's vocabulary has grown.
        options: dict[str, Any] = (
            {"save_embedding_layers": False} if isinstance(self.model, PeftModel) else {}
        )
        self.model.save_pretrained(folder, state_dict=state_dict, **options)
        self.processing_class.save_pretrained(folder)

    # --- what DeepSpeed needs ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As transformers does, without empty groups: DeepSpeed drops them, and a checkpoint has the same everywhere."""
        if self.optimizer is None:
            made = super().create_optimizer(model)
            made.param_groups[:] = [group for group in made.param_groups if group["params"]]
            self._groups = [dict(group) for group in made.param_groups]
        return self.optimizer

    def _prepare_for_training(
        self,
        max_steps: int,
        train_dataloader: Any,  # noqa: ANN401 - as transformers
        resume_from_checkpoint: str | None,
    ) -> Any:  # noqa: ANN401 - as transformers
        is_ours = self.is_deepspeed_enabled  # else transformers would look for DeepSpeed's pickles
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]  # transformers is only partly typed
            max_steps, train_dataloader, None if is_ours else resume_from_checkpoint
        )
        if is_ours:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    # --- reading -----------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(
        self,
        resume_from_checkpoint: str,
        model: nn.Module | None = None,  # noqa: ARG002 - as transformers
    ) -> None:
        if is_sharded(self.model):
            return  # done before the weights were cut
        checkpoint.load_weights(self.model, Path(resume_from_checkpoint).parent)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._resume is None:
            return
        state = self._resume.optimizer_state()
        if self.is_deepspeed_enabled:
            deepspeed.load_whole_optimizer_state(self._own_optimizer, self._groups, state)
        elif is_sharded(self.model):
            load_whole_optimizer_state(self.model, self._own_optimizer, state)
        else:
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(self._resume.json["scheduler"])
        self.published_step = self.state.global_step
        self.state.compute_steps(self.args, self.state.max_steps)
        own = self._resume.trainer
        self._compare_environment(own["environment"])
        self.restore_own_state(own)

    def _environment(self) -> dict[str, str]:
        return environment(torch.device(self.args.device)) | {"processes": str(self.ranks.count)}

    def _compare_environment(self, before: dict[str, str]) -> None:
        now = self._environment()
        changed = [
            f"{name} was {value} and is {now.get(name)}"
            for name, value in before.items()
            if now.get(name) != value
        ]
        if changed:
            self.sink.event(
                "warn",
                "the environment is not that of the checkpoint, so results may differ in the last digits: "
                + "; ".join(changed),
                {"kind": "environment", "changed": changed},
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._resume is not None:
            self._resume.restore_random()
