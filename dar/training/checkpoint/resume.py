"""`RunCheckpoints`: publishes the checkpoints of a run, and loads the one that it resumes from.

It replaces everything by which `transformers.Trainer` saves and loads: transformers writes in
place, picks the folder with the highest number even if it is incomplete, and pickles optimizer,
scheduler and random states.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import TRAINER_STATE_NAME

from dar.errors import CheckpointError
from dar.protocol.checkpoints import RESUME_FOLDER, Manifest, ManifestFile, checkpoint_folders
from dar.training.checkpoint import checkpoint
from dar.training.checkpoint.background import BackgroundWriter
from dar.training.checkpoint.disk_errors import explained
from dar.training.checkpoint.fingerprint import differences, differences_of_parts, environment
from dar.training.checkpoint.hub import HubPush
from dar.training.model.adapters import save_adapter
from dar.training.parallel import deepspeed
from dar.training.parallel.sharding import (
    is_sharded,
    load_whole_optimizer_state,
    whole_optimizer_state,
    whole_weights,
)
from dar.training.report.sink import StopRequestedError
from dar.training.run_context import RunContext

MULTIPLIER = "rate_multiplier"
"""What a learning rate that was chosen was multiplied by; earlier versions do not say it."""
LENGTH = frozenset({"max_steps", "num_train_epochs"})
"""Arguments of which a resumed run may have larger ones."""
Write = Callable[[Path], None]
MakeManifest = Callable[[list[ManifestFile], int], Manifest]
"""Makes the manifest of these files; the number is the last event that was sent before."""


class Stateful(Protocol):
    """A part of the trainer that a resumed run continues from its state."""

    def state(self) -> dict[str, Any]:
        """The state as JSON values. The keys of all parts lie side by side in a checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state, which holds the keys of all parts."""


class RunCheckpoints:
    """Publishes checkpoints in ``output_dir/checkpoints/step-<n>`` and resumes from one.

    All processes call its methods together; the main one writes, and the others wait for it.

    Args:
        run: The training run.
        hub: Uploads what was published.
        decisive: Everything that decides the result; see `decisive_facts`.
        parts: What else has to be the same; see `part_digests`.
        is_resized: Whether an adapter is published with the token embeddings.
        members: The parts of the trainer that have a state.
        last_report: Returns the metrics of the last report.
        has_new_ends: Whether adapters are saved with the generation config, because that of the
            base model lacks tokens that end a completion.
    """

    def __init__(
        self,
        run: RunContext,
        hub: HubPush,
        *,
        decisive: dict[str, Any],
        parts: dict[str, str],
        is_resized: bool,
        members: Sequence[Stateful],
        last_report: Callable[[], dict[str, float]],
        has_new_ends: bool,
    ) -> None:
        self.published_step = 0
        """Step of the newest checkpoint that was written or resumed from."""
        self._run = run
        self._hub = hub
        self._decisive = decisive
        self._parts = parts
        chosen = run.trainer.args.chosen_rate
        self._multiplier: float | None = None if chosen is None else chosen.multiplier
        self.config_sha256 = checkpoint.digest(decisive)
        self._is_resized = is_resized
        self._members = members
        self._last_report = last_report
        self._has_new_ends = has_new_ends
        self._saved_at = time.monotonic()
        self._resumed: checkpoint.ResumeState | None = None
        self._is_longer = False
        """Whether the run has more steps than the one that it resumes."""
        self._own_folders: tuple[Path, ...] = ()
        """Checkpoints of this run that are still kept, oldest first."""
        self._writer = BackgroundWriter()
        self._groups: deepspeed.Groups = ()
        """The optimizer's parameter groups when it was created."""

    @property
    def root(self) -> Path:
        """Folder of the checkpoints."""
        return Path(str(self._run.trainer.args.output_dir)) / "checkpoints"

    def named(self, resume: str | Path | bool) -> Path:
        """The checkpoint that ``resume_from_checkpoint`` names; true is the newest of this run.

        Raises:
            CheckpointError: There is none, or a path begins with ``~`` and no user's name.
        """
        if not isinstance(resume, bool):
            try:
                return Path(resume).expanduser()
            except RuntimeError:
                raise CheckpointError(
                    f"resume_from_checkpoint {resume}: {Path(resume).parts[0]} is no folder of a "
                    f"user; if the name begins with ~, give ./{resume}"
                ) from None
        found = checkpoint_folders(self.root)
        if not found:
            raise CheckpointError(f"there is no checkpoint in {self.root}")
        return found[-1]

    def sweep(self) -> None:
        """Remove what killed processes left half-written; called when training begins."""
        self._saved_at = time.monotonic()
        self._run.ranks.from_main(lambda: checkpoint.sweep(self.root))

    # --- reading -------------------------------------------------------------------------------

    def open(self, folder: Path) -> Manifest:
        """Verify the checkpoint in ``folder`` and make it the one that is resumed from.

        Raises:
            CheckpointError: It is damaged or belongs to other arguments.
        """
        manifest = Manifest.model_validate(
            self._run.ranks.from_main(
                lambda: checkpoint.verify_or_name_older(folder).model_dump(mode="json")
            )
        )
        self._resumed = checkpoint.ResumeState.load(folder)
        if manifest.config_sha256 != self.config_sha256:
            self._keep_rate(self._resumed.trainer)
            self._keep_budget(manifest, self._resumed.trainer.get("decisive"))
        if manifest.config_sha256 != self.config_sha256:
            self._compare(folder, self._resumed.trainer.get("decisive"))
        if found := differences_of_parts(self._resumed.trainer.get("parts", {}), self._parts):
            raise self._other_arguments(folder, found)
        if folder.resolve().parent == self.root.resolve():
            self._own_folders = (self.root / folder.name,)
        return manifest

    def _keep_rate(self, resumed: Mapping[str, Any]) -> None:
        """Go on with the checkpoint's learning rate if this run would only choose one.

        The choice may have changed between two versions, or with the length of the run. With
        another multiplier it does not go on.
        """
        args, before = self._run.trainer.args, resumed.get("decisive")
        if before is None or (chosen := args.chosen_rate) is None:
            return
        rate, multiplier = before["config"]["learning_rate"], resumed.get(MULTIPLIER)
        is_earlier = multiplier is None and rate == chosen.without_budget
        if rate == args.learning_rate or not (chosen.multiplier in (1, multiplier) or is_earlier):
            return
        self._run.sink.event(
            "info",
            f"the run goes on with the peak learning rate that it began with, {rate:g}; a new run "
            f"would have {args.learning_rate:g}",
            {"kind": "kept_learning_rate", "learning_rate": rate, "chosen": args.learning_rate},
        )
        args.learning_rate, args.chosen_rate = rate, None
        self._multiplier = multiplier or chosen.multiplier
        self._decisive["config"]["learning_rate"] = rate
        self.config_sha256 = checkpoint.digest(self._decisive)

    def _keep_budget(self, manifest: Manifest, before: Mapping[str, Any] | None) -> None:
        """Go on with the checkpoint's ``kl_budget``, or without, if this run has the default.

        The default may have changed between two versions.
        """
        args = self._run.trainer.args
        # a version that kept no facts had no budget either
        budget = None if before is None else before["config"].get("kl_budget")
        if not args.has_default_budget or budget == args.kl_budget:
            return
        values = {"alpha": args.alpha, "beta": args.beta}
        config = {k: v for k, v in self._decisive["config"].items() if k != "kl_budget"}
        config |= values if budget is None else {"kl_budget": budget}
        digest = checkpoint.digest(self._decisive | {"config": config})
        if before is None and digest != manifest.config_sha256:
            return
        how = "with alpha and beta" if budget is None else f"with kl_budget {budget:g}"
        self._run.sink.event(
            "info",
            f"the run goes on as it began, {how}; a new run would have kl_budget {args.kl_budget:g}",
            {"kind": "kept_kl_budget", "kl_budget": budget, "default": args.kl_budget},
        )
        args.kl_budget, args.has_default_budget = budget, False
        self._decisive["config"], self.config_sha256 = config, digest

    def _compare(self, folder: Path, before: dict[str, Any] | None) -> None:
        """Accept a checkpoint of other arguments if only the number of steps has grown.

        Raises:
            CheckpointError: Something else differs.
        """
        found = {} if before is None else differences(before, self._decisive)
        if before is not None and found and found.keys() <= LENGTH:
            old, new = (facts["config"]["max_steps"] for facts in (before, self._decisive))
            self._is_longer = self._is_longer_than(before)
            if self._is_longer:
                self._run.sink.event(
                    "info",
                    f"the run goes on to step {new}; the checkpoint's was to end at step {old}, and "
                    "the learning rate now follows the schedule of the longer run",
                    {"kind": "longer_run", "before": old, "now": new},
                )
            if new >= old:
                return
        if before is not None and self._is_longer_than(before):
            found = {name: text for name, text in found.items() if name not in LENGTH}
        raise self._other_arguments(
            folder, list(found.values()) or ["other hyperparameters, data or base weights"]
        )

    def _is_longer_than(self, before: Mapping[str, Any]) -> bool:
        old, new = (facts["config"]["max_steps"] for facts in (before, self._decisive))
        return int(new) > int(old)

    def _other_arguments(self, folder: Path, found: Sequence[str]) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint {folder} was made with other arguments: {'; '.join(found)}; resume "
            "with the same ones, or start a new run from its model"
        )

    def load_weights(self, folder: Path) -> None:
        """Load the weights of the checkpoint in ``folder`` into the trainer's model."""
        checkpoint.load_weights(self._run.trainer.model, folder)

    def restore_members(self) -> None:
        """Give the parts of the trainer their state in the opened checkpoint."""
        assert self._resumed is not None
        own = self._resumed.trainer
        for member in self._members:
            member.restore(own)

    def restore_training(self) -> None:
        """Continue optimizer, scheduler and the parts of the trainer from the opened checkpoint."""
        if self._resumed is None:
            return
        trainer = self._run.trainer
        optimizer = self._resumed.optimizer_state()
        if trainer.is_deepspeed_enabled:
            deepspeed.load_whole_optimizer_state(self._optimizer, self._groups, optimizer)
        elif is_sharded(trainer.model):
            load_whole_optimizer_state(trainer.model, self._optimizer, optimizer)
        else:
            trainer.optimizer.load_state_dict(optimizer)
        schedule = dict(self._resumed.json["scheduler"])
        if self._is_longer:
            self._follow_schedule(schedule)
        trainer.lr_scheduler.load_state_dict(schedule)
        self.published_step = trainer.state.global_step
        trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
        self._compare_environment(self._resumed.trainer["environment"])
        self.restore_members()

    def _follow_schedule(self, state: dict[str, Any]) -> None:
        """Set the learning rate of the next step of the longer run's schedule."""
        scheduler: Any = self._run.trainer.lr_scheduler
        scheduler = getattr(scheduler, "scheduler", scheduler)  # inside accelerate's wrapper
        if not isinstance(scheduler, LambdaLR):
            return
        state["_last_lr"] = [
            base * factor(state["last_epoch"])
            for base, factor in zip(state["base_lrs"], scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self._optimizer.param_groups, state["_last_lr"], strict=True):
            group["lr"] = rate

    def restore_random(self) -> None:
        """Continue the random generators from the opened checkpoint."""
        if self._resumed is not None:
            self._resumed.restore_random()

    def _environment(self) -> dict[str, str]:
        device = torch.device(self._run.trainer.args.device)
        return environment(device) | {"processes": str(self._run.ranks.count)}

    def _compare_environment(self, before: dict[str, str]) -> None:
        now = self._environment()
        changed = [
            f"{name} was {value} and is {now.get(name)}"
            for name, value in before.items()
            if now.get(name) != value
        ]
        if changed:
            self._run.sink.event(
                "warn",
                "the environment is not that of the checkpoint, so results may differ in the last "
                "digits: " + "; ".join(changed),
                {"kind": "environment", "changed": changed},
            )

    # --- writing -------------------------------------------------------------------------------

    def is_due(self) -> bool:
        """Whether the step that ended needs a checkpoint besides those of ``args.save_steps``.

        That is so if ``args.checkpoint_seconds`` have passed since the last one, or if the step is
        evaluated and ``args.saves_evaluated`` is set.

        Raises:
            OSError: The last checkpoint could not be written.
        """
        trainer = self._run.trainer
        if self._run.ranks.count == 1:
            self._writer.check()
        if trainer.args.saves_evaluated and trainer.control.should_evaluate:
            return True
        seconds = self._run.trainer.args.checkpoint_seconds
        if seconds is None:
            return False
        return self._run.ranks.from_main(lambda: time.monotonic() - self._saved_at >= seconds)

    def save(self) -> None:
        """Publish a checkpoint of the last step; `finish` waits for it."""
        trainer = self._run.trainer
        weights = self._whole_weights()
        optimizer = self._whole_optimizer_state()
        describe = functools.partial(
            Manifest,
            step=trainer.state.global_step,
            kind="adapter" if isinstance(trainer.model, PeftModel) else "full",
            config_sha256=self.config_sha256,
            metrics=dict(self._last_report()),
        )
        self._publish(
            lambda folder: self._write(folder, weights, optimizer),
            lambda files, last_seq: describe(files=files, last_seq=last_seq),
        )

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Wait at the end of the block for a checkpoint that is still being written.

        It does not wait if a stop was requested: after a cancellation nothing may delay the end.
        """
        try:
            yield
        except StopRequestedError:
            raise
        except BaseException:
            self._writer.wait()  # the job resumes from it
            raise
        self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; only the main process writes one.

        The other processes do not wait, because they may have left after an error of one.

        Raises:
            OSError: The disk is full or broken; it was not published.
        """
        self._writer.finish()

    def republish(self, folder: Path, manifest: Manifest) -> None:
        """Publish the checkpoint in ``folder`` again, in this run's folder."""
        self._publish(
            lambda target: checkpoint.copy_files(folder, target, manifest),
            lambda files, last_seq: manifest.model_copy(
                update={"files": files, "last_seq": last_seq}
            ),
        )

    def save_model(self, folder: Path) -> None:
        """Write what `from_pretrained` reads, and the model card."""
        weights = self._whole_weights()
        with explained("the model", folder, self.root):
            self._write_model(folder, weights)
            self._hub.write_card(folder)

    def _publish(self, write: Write, manifest: MakeManifest) -> None:
        self._run.ranks.from_main(lambda: self._publish_here(write, manifest))
        self.published_step = self._run.trainer.state.global_step
        self._saved_at = time.monotonic()

    def _publish_here(self, write: Write, manifest: MakeManifest) -> None:
        sink, step = self._run.sink, self._run.trainer.state.global_step
        self._run.phase("checkpointing")
        last_seq = sink.flush()
        self._writer.finish()  # only one is written at a time
        staged = checkpoint.stage(self.root, step, write)

        def complete() -> None:
            published = checkpoint.complete(staged, step, lambda files: manifest(files, last_seq))
            sink.checkpoint(step, published.folder, published.manifest, published.manifest_sha256)
            self._hub.push_checkpoint(published.folder)
            self._keep_last(published.folder)

        # Digests and syncs take longest; they need nothing of the trainer, so it may go on.
        if self._run.trainer.args.saves_in_background:
            self._writer.start(complete)
        else:
            complete()

    def _keep_last(self, newest: Path) -> None:
        """Remove this run's checkpoints beyond ``args.save_total_limit``; those of others stay."""
        folders = (*(folder for folder in self._own_folders if folder != newest), newest)
        excess = len(folders) - (self._run.trainer.args.save_total_limit or len(folders))
        for folder in folders[: max(0, excess)]:
            shutil.rmtree(folder, ignore_errors=True)
        self._own_folders = folders[max(0, excess) :]

    def _write(
        self, folder: Path, weights: dict[str, Tensor] | None, optimizer: Mapping[str, Any]
    ) -> None:
        trainer = self._run.trainer
        self._write_model(folder, weights)
        self._hub.write_card(folder)  # instead of peft's, which has paths of this machine
        trainer.state.save_to_json(str(folder / RESUME_FOLDER / TRAINER_STATE_NAME))
        own: dict[str, Any] = {
            "environment": self._environment(),
            "decisive": self._decisive,
            "parts": self._parts,
            MULTIPLIER: self._multiplier,
        }
        for member in self._members:
            own |= member.state()
        checkpoint.save_resume_state(folder, optimizer, trainer.lr_scheduler.state_dict(), own)

    def _write_model(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        if not self._run.ranks.is_main:
            return
        model = self._run.trainer.model
        if isinstance(model, PeftModel):
            save_adapter(model, folder, weights, with_embeddings=self._is_resized)
            if self._has_new_ends:  # the base model's generation config lacks them
                model.generation_config.save_pretrained(str(folder))
        else:
            model.save_pretrained(str(folder), state_dict=weights)
        self._run.trainer.processing_class.save_pretrained(str(folder))

    def _whole_weights(self) -> dict[str, Tensor] | None:
        """The gathered weights of a sharded model; None where the model has them itself."""
        model = self._run.trainer.model
        return whole_weights(model) if is_sharded(model) else None

    def _whole_optimizer_state(self) -> Mapping[str, Any]:
        trainer = self._run.trainer
        if trainer.is_deepspeed_enabled:
            return deepspeed.whole_optimizer_state(
                self._optimizer, self._groups, is_main=self._run.ranks.is_main
            )
        if is_sharded(trainer.model):
            return whole_optimizer_state(trainer.model, self._optimizer)
        return trainer.optimizer.state_dict()

    @property
    def _optimizer(self) -> Optimizer:
        """The optimizer inside accelerate's wrapper."""
        optimizer = self._run.trainer.optimizer
        inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner

    def without_empty_groups(self, optimizer: Optimizer) -> Optimizer:
        """Drop empty parameter groups, as DeepSpeed does: a checkpoint has the same everywhere."""
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self._groups = [dict(group) for group in optimizer.param_groups]
        return optimizer
