"""`HubTrainer`: what is saved can be loaded by `from_pretrained`, says what it is, and goes to the hub if asked to.

Only what `from_pretrained` reads is pushed, and the model card. The state of a resume goes along with the hub strategies
``checkpoint`` and ``all_checkpoints`` alone.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitInfo
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import hf_api

from dar.errors import TrainingError
from dar.protocol.checkpoints import MANIFEST_NAME, RESUME_FOLDER
from dar.training.checkpoint.model_card import TAGS, CardFacts, card_text
from dar.training.config.config import DARConfig
from dar.training.model.loading import LanguageModel
from dar.training.report.sink import NullSink, Sink

CARD_NAME = "README.md"
LAST_CHECKPOINT = "last-checkpoint"
"""Folder in the repository with the newest whole checkpoint, under the hub strategy ``checkpoint``."""
HUB_ERRORS = (OSError, httpx2.HTTPError, ValueError, RuntimeError)
"""What a hub client raises: refused, unreachable, no such name, an upload that broke off."""


@dataclass(frozen=True, slots=True)
class Push:
    """A checkpoint on its way to the hub."""

    step: int
    folder: Path
    """What is uploaded; to be removed afterwards."""
    upload: Future[CommitInfo]


class HubTrainer(Trainer):
    """Saves models with a card, and pushes them."""

    args: DARConfig
    model: LanguageModel
    sink: Sink = NullSink()

    hub_model_id: str | None  # type: ignore[assignment]  # transformers annotates the None it starts with
    """Repository, once it is made."""
    base_name: str | None = None
    """Name of the model that training starts from."""
    reward_names: Sequence[str] = ()
    """Names of the reward components."""
    _pushes: tuple["Push", ...] = ()
    """Checkpoints on their way to the hub."""

    def step_values(self) -> dict[str, float]:
        """Metrics of the last report."""
        return {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what `from_pretrained` reads, with a model card; with ``args.push_to_hub``, push it too.

        Args:
            output_dir: Folder; default: that of the arguments.
            _internal_call: Whether transformers calls, which pushes by itself.

        Raises:
            TrainingError: The hub cannot be reached, or refuses.
        """
        self._save_whole(output_dir)
        self._write_card(Path(output_dir or str(self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub("Model save", revision=self.args.hub_revision)

    def _save_whole(self, output_dir: str | None) -> None:
        """Save weights and tokenizer; all processes call it, and the main one writes."""
        super().save_model(output_dir, _internal_call=True)

    def create_model_card(  # type: ignore[override]  # transformers takes facts that nothing here could use
        self,
        model_name: str | None = None,
        dataset: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write ``README.md`` into the output folder.

        Args:
            model_name: Default: the last part of ``hub_model_id``, or of the output folder.
            dataset: Names of data sets on the hub.
            tags: Further tags.
            language: ISO 639 code, or several.
            license: SPDX identifier in small letters, like ``apache-2.0``.
        """
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._write_card(
            folder,
            model_name=model_name,
            dataset=dataset,
            tags=tags,
            language=language,
            license=license,
        )

    def push_to_hub(  # type: ignore[override]  # the card's facts have names here
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,  # noqa: ANN401 - those of `create_model_card`
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Push what `save_model` saves to ``args.hub_model_id``, which is made if need be.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait for the end of the upload.
            token: Of the hub; default: ``args.hub_token``, or the one this machine is logged in with.
            revision: Branch; default: ``args.hub_revision``, or the main one.
            private: Whether a new repository is private; default: ``args.hub_private_repo``.
            **card: Facts for the model card; see `create_model_card`.

        Returns:
            The commit, or its future without ``blocking``; None on other processes than the main one.

        Raises:
            TrainingError: The hub cannot be reached, or refuses.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with contextlib.ExitStack() as cleaning:
            staging = Path(tempfile.mkdtemp(prefix="dar-push-"))
            cleaning.callback(shutil.rmtree, staging, ignore_errors=True)
            self.save_model(str(staging), _internal_call=True)
            if not self.is_world_process_zero():
                return None
            if card:
                self._write_card(staging, **card)
            self._finish_current_push()
            try:
                upload = self._upload(staging, commit_message or "End of training", token, revision)
                if blocking:
                    return upload.result()
            except HUB_ERRORS as error:
                raise _hub_error(self._repository, error) from error
            later = cleaning.pop_all()
            upload.add_done_callback(lambda _: later.close())
        return upload

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, unless it is there.

        Args:
            token: Default: ``args.hub_token``, or the one this machine is logged in with.
            private: Default: ``args.hub_private_repo``.

        Raises:
            TrainingError: The hub cannot be reached, or refuses.
        """
        try:
            super().init_hf_repo(token, private)
        except HUB_ERRORS as error:
            raise _hub_error(self._repository, error) from error

    @property
    def _repository(self) -> str:
        named = self.hub_model_id or self.args.hub_model_id
        return str(named or Path(str(self.args.output_dir)).absolute().name)

    # --- checkpoints on their way ------------------------------------------------------------------------------------

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Begin to push a published checkpoint, as ``args.hub_strategy`` says; training goes on meanwhile."""
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.args.push_to_hub or strategy == HubStrategy.END:
            return
        self._end_pushes([push for push in self._pushes if push.upload.done()])
        if self._pushes and not self.args.hub_always_push:
            return
        step, folder = self.state.global_step, Path(checkpoint_folder)
        message = f"Training in progress, step {step}"
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        model = _staged(folder, without={RESUME_FOLDER, MANIFEST_NAME})
        self._write_card(model)
        self._pushes += (Push(step, model, self._upload(model, message)),)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            target = LAST_CHECKPOINT if strategy == HubStrategy.CHECKPOINT else folder.name
            whole = _staged(folder)
            upload = self._upload(whole, f"{message}, checkpoint", into=target)
            self._pushes += (Push(step, whole, upload),)

    def _upload(
        self,
        folder: Path,
        message: str,
        token: str | None = None,
        revision: str | None = None,
        *,
        into: str | None = None,
    ) -> Future[CommitInfo]:
        """Begin to upload ``folder``."""
        return hf_api().upload_folder(
            repo_id=self._repository,
            folder_path=folder,
            path_in_repo=into,
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            run_as_future=True,
        )

    def _finish_current_push(self) -> None:
        self._end_pushes(self._pushes)

    def _end_pushes(self, pushes: Sequence[Push]) -> None:
        """Wait for them, and say what did not arrive: training goes on, as its checkpoints lie here too."""
        self._pushes = tuple(push for push in self._pushes if push not in pushes)
        for push in pushes:
            error = push.upload.exception()
            shutil.rmtree(push.folder, ignore_errors=True)
            if error is not None:
                self.sink.event(
                    "warn",
                    f"the checkpoint of step {push.step} did not reach the hub: {error}",
                    {"kind": "push_failed", "step": push.step},
                )

    # --- the card ----------------------------------------------------------------------------------------------------

    def describe(self, base_name: str | None, reward_names: Sequence[str]) -> None:
        """Take what the card tells beside the arguments, and tag the model for whoever pushes it without this trainer.

        Args:
            base_name: Name of the model that training starts from.
            reward_names: Names of the reward components.
        """
        self.base_name, self.reward_names = base_name, reward_names
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        base.add_model_tags(list(TAGS[:2]))

    def _write_card(
        self,
        folder: Path,
        *,
        model_name: str | None = None,
        dataset: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
    ) -> None:
        if not self.is_world_process_zero():
            return
        values = self.args.decisive_values()
        facts = CardFacts(
            name=model_name or self._repository.rsplit("/", 1)[-1],
            base=self.base_name,
            is_adapter=isinstance(self.model, PeftModel),
            steps=self.state.global_step,
            values={name: value for name, value in values.items() if value not in (None, [], {})},
            metrics=self.step_values(),
            datasets=_listed(dataset),
            tags=_listed(tags),
            language=language,
            license=license,
            rewards=self.reward_names,
        )
        (folder / CARD_NAME).write_text(card_text(facts), encoding="utf-8")


def _listed(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _staged(source: Path, without: frozenset[str] | set[str] = frozenset()) -> Path:
    """A copy of a checkpoint that lasts until its upload ends, also where the checkpoint itself is removed before."""
    target = Path(tempfile.mkdtemp(prefix=".push-", dir=source.parent.parent))

    def left_out(folder: str, names: list[str]) -> set[str]:
        return set(names) & without if Path(folder) == source else set()

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=left_out, copy_function=_link)
    card = target / CARD_NAME
    if without and card.exists():
        card.unlink()  # it is a link into the checkpoint, and another is written in its place
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)


def _hub_error(repository: str, error: Exception) -> TrainingError:
    return TrainingError(
        f"{repository!r} cannot be pushed to the hub: {error}; the model lies on this machine and can be pushed later",
        param="push_to_hub",
        code="push_failed",
    )
