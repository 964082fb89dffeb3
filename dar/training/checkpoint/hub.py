"""`HubPush`: writes the model card, and uploads models and checkpoints to the hub.

Only what `from_pretrained` reads is uploaded, and the model card. The hub strategies ``checkpoint``
and ``all_checkpoints`` upload the state that a resume needs as well.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitInfo
from peft import PeftModel
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import hf_api

from dar.errors import TrainingError
from dar.protocol.checkpoints import MANIFEST_NAME, RESUME_FOLDER
from dar.training.checkpoint.model_card import TAGS, CardFacts, CardNotes, card_text
from dar.training.config.config import DARConfig
from dar.training.model.adapters import LanguageModel, kind_of
from dar.training.run_context import RunContext

CARD_NAME = "README.md"
LAST_CHECKPOINT = "last-checkpoint"
"""Folder in the repository with the newest checkpoint, under the hub strategy ``checkpoint``."""
HUB_ERRORS = (OSError, httpx2.HTTPError, ValueError, RuntimeError)
"""Raised by a hub client: unreachable, rejected, no such name, an upload that broke off."""


@dataclass(frozen=True, slots=True)
class PendingPush:
    """A checkpoint that is being uploaded."""

    step: int
    folder: Path
    """The uploaded copy; removed afterwards."""
    upload: Future[CommitInfo]


class HubPush:
    """Writes model cards and uploads to the hub.

    Args:
        run: The training run.
        base_name: Name of the model that training starts from.
        is_resized: Whether an adapter is published with the token embeddings.
        reward_names: Names of the reward components.
        last_report: Returns the metrics of the last report.
    """

    def __init__(
        self,
        run: RunContext,
        *,
        base_name: str | None,
        is_resized: bool,
        reward_names: Sequence[str],
        last_report: Callable[[], Mapping[str, float]],
    ) -> None:
        self._run = run
        self._base_name = base_name
        self._is_resized = is_resized
        self.reward_names = reward_names
        self._last_report = last_report
        self._pending: tuple[PendingPush, ...] = ()

    @property
    def _repository(self) -> str:
        return repository_name(self._run.trainer.args, self._run.trainer.hub_model_id)

    def push(
        self,
        message: str,
        *,
        write_model: Callable[[Path], None],
        is_blocking: bool,
        token: str | None,
        revision: str | None,
        private: bool | None,
        notes: CardNotes | None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the model by ``write_model``, a collective, and upload it with its card.

        See `dar.DARTrainer.push_to_hub`.
        """
        trainer = self._run.trainer
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(token=token, private=private)
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        with contextlib.ExitStack() as cleanup:
            staging = Path(tempfile.mkdtemp(prefix="dar-push-"))
            cleanup.callback(shutil.rmtree, staging, ignore_errors=True)
            write_model(staging)
            if not self._run.ranks.is_main:
                return None
            self.write_card(staging, notes)
            self.finish()
            with hub_errors(self._repository):
                upload = self._upload(staging, message, token, revision)
                if is_blocking:
                    return upload.result()
            later = cleanup.pop_all()
            upload.add_done_callback(lambda _: later.close())
        return upload

    def push_checkpoint(self, folder: Path) -> None:
        """Start to upload a published checkpoint, as ``args.hub_strategy`` says."""
        trainer = self._run.trainer
        strategy = HubStrategy(trainer.args.hub_strategy)
        if not trainer.args.push_to_hub or strategy == HubStrategy.END:
            return
        self._end([push for push in self._pending if push.upload.done()])
        if self._pending and not trainer.args.hub_always_push:
            return
        step = trainer.state.global_step
        message = f"Training in progress, step {step}"
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        model = _staged(folder, without={RESUME_FOLDER, MANIFEST_NAME})
        self.write_card(model)
        self._pending += (PendingPush(step, model, self._upload(model, message)),)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            target = LAST_CHECKPOINT if strategy == HubStrategy.CHECKPOINT else folder.name
            whole = _staged(folder)
            upload = self._upload(whole, f"{message}, checkpoint", into=target)
            self._pending += (PendingPush(step, whole, upload),)

    def _upload(
        self,
        folder: Path,
        message: str,
        token: str | None = None,
        revision: str | None = None,
        *,
        into: str | None = None,
    ) -> Future[CommitInfo]:
        args = self._run.trainer.args
        return hf_api().upload_folder(
            repo_id=self._repository,
            folder_path=folder,
            path_in_repo=into,
            commit_message=message,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
            run_as_future=True,
        )

    def finish(self) -> None:
        """Wait for all uploads of checkpoints."""
        self._end(self._pending)

    def _end(self, pushes: Sequence[PendingPush]) -> None:
        """Wait for these uploads. A failed one is only reported: the checkpoint is on disk too."""
        self._pending = tuple(push for push in self._pending if push not in pushes)
        for push in pushes:
            error = push.upload.exception()
            shutil.rmtree(push.folder, ignore_errors=True)
            if error is not None:
                self._run.sink.event(
                    "warn",
                    f"the checkpoint of step {push.step} did not reach the hub: {error}",
                    {"kind": "push_failed", "step": push.step},
                )

    def write_card(self, folder: Path, notes: CardNotes | None = None) -> None:
        """Write the model card into ``folder``, on the main process."""
        if not self._run.ranks.is_main:
            return
        trainer = self._run.trainer
        notes = notes or CardNotes()
        values = trainer.args.decisive_values()
        model = trainer.model
        facts = CardFacts(
            name=notes.model_name or self._run.job_id or self._repository.rsplit("/", 1)[-1],
            base=self._base_name,
            adapter=kind_of(model.active_peft_config) if isinstance(model, PeftModel) else None,
            resized_to=model.config.get_text_config().vocab_size if self._is_resized else None,
            steps=trainer.state.global_step,
            values={name: value for name, value in values.items() if value not in (None, [], {})},
            metrics=self._last_report(),
            rewards=self.reward_names,
            notes=notes,
        )
        (folder / CARD_NAME).write_text(card_text(facts), encoding="utf-8")


def tag_model(model: LanguageModel) -> None:
    """Add the method's tags to the model, for a push without this trainer."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.add_model_tags(list(TAGS[:2]))


def repository_name(args: DARConfig, made: str | None) -> str:
    """Repository: the created one, else the configured one, else the folder's name."""
    return str(made or args.hub_model_id or Path(str(args.output_dir)).absolute().name)


@contextlib.contextmanager
def hub_errors(repository: str, *, has_begun: bool = True) -> Iterator[None]:
    """Turn errors of the hub's client into `TrainingError`.

    Args:
        repository: Its name.
        has_begun: Whether there is a run, and so a model.
    """
    try:
        yield
    except HUB_ERRORS as error:
        outcome = (
            "the model is on this machine and can be pushed later"
            if has_begun
            else "nothing was trained; leave push_to_hub out to train now and push the model later"
        )
        raise TrainingError(
            f"{repository!r} cannot be pushed to the hub: {error}; {outcome}",
            param="push_to_hub",
            code="push_failed",
        ) from error


def _staged(source: Path, without: frozenset[str] | set[str] = frozenset()) -> Path:
    """A copy of a checkpoint, as the upload may end after the checkpoint is removed."""
    target = Path(tempfile.mkdtemp(prefix=".push-", dir=source.parent.parent))

    def left_out(folder: str, names: list[str]) -> set[str]:
        return set(names) & without if Path(folder) == source else set()

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=left_out, copy_function=_link)
    card = target / CARD_NAME
    if without and card.exists():
        card.unlink()  # a link into the checkpoint; another card is written in its place
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)
