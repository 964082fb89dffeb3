"""The models of one attempt: in the worker's own folder, its cache, the service or the hub."""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from dar.errors import HubUnreachableError, ModelNotFoundError
from dar.protocol.worker import REWARD_MODELS, InputFile, Lease, PinRevisions, RevisionsPinned
from dar.settings import Settings
from worker.api import GaveUpError, MissingError, WorkerClient
from worker.models.cache import ModelCache, ModelRecord
from worker.models.hub import Hub, hub_token, library_main, library_snapshot
from worker.models.local import InputFetchError, bytes_to_arrive, local_folder, safe_path

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.1
MODEL = "model"
RESERVED_BYTES = 256 * 1024**2
"""Free disk space that a download must leave."""


def check_room(folder: Path, needed: int) -> None:
    """Check that the disk has room for a download.

    Raises:
        InputFetchError: It has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVED_BYTES:
        raise InputFetchError(
            f"the worker's disk has {free:,} bytes free, but the job's inputs need {needed:,} "
            f"and {RESERVED_BYTES:,} must stay free; make room on that worker",
            code="disk_full",
        )


@dataclass(frozen=True, slots=True)
class NeededModel:
    """A model that an attempt needs."""

    prefix: str
    """Its files are the inputs ``<prefix>/…``, if the service has them."""
    name: str
    """Folder, or hub id; empty for a model made of a full checkpoint."""
    param: str
    """The parameter of the spec that names it."""
    what: str
    """How messages name it."""
    checkpoint_id: str | None = None

    @property
    def is_of_hub(self) -> bool:
        return "/" in self.name

    @property
    def cached_as(self) -> str:
        """Its name in the cache."""
        return self.checkpoint_id or self.name


def models_of(lease: Lease) -> list[NeededModel]:
    """All models of a job."""
    source, rewards = lease.model, lease.spec.dar.rewards
    what = f"the model {source.name or lease.spec.model!r}"
    found = [NeededModel(MODEL, source.name, "model", what, source.checkpoint_id)]
    for one in [] if rewards is None else rewards.components:
        if one.model is not None:
            what = f"the reward model {one.model!r} of component {one.name}"
            prefix = f"{REWARD_MODELS}/{one.name}"
            found.append(NeededModel(prefix, one.model, "method.dar.rewards", what))
    return found


Download = Callable[[InputFile, Path], None]
"""Downloads an input file of the service to a path, and verifies it."""


@dataclass
class ModelFetcher:
    """Finds the models of one attempt, and downloads those that this host lacks.

    Each of them stays in the cache while ``held`` is open. A model for which the cache has no room
    is downloaded for this attempt alone.
    """

    lease: Lease
    client: WorkerClient
    settings: Settings
    inputs: Path
    """The attempt's folder of inputs."""
    must_stop: Callable[[], bool]
    note: Callable[[str], None]
    """Shows what the attempt waits for."""
    held: contextlib.ExitStack
    places: dict[str, Path] = field(default_factory=dict)
    """Folders of the models that were found, by prefix."""

    def __post_init__(self) -> None:
        self._cache = ModelCache.of(self.settings)
        self._commits = dict(self.lease.model.revisions)

    def fetch(self, files: Sequence[InputFile], download: Download) -> Mapping[str, Path]:
        """Folders of all models, by prefix; a hub model is missing if only a trainer can load it.

        Args:
            files: The inputs that the service has.
            download: Downloads one of them.

        Raises:
            ModelNotFoundError: Nobody has the model.
            InputFetchError: It cannot be downloaded.
            HubUnreachableError: The hub does not answer, and this host lacks the model.
            GaveUpError: The attempt must stop.
            DARError: The service rejects a request.
        """
        for model in models_of(self.lease):
            if model.prefix in self.places:
                continue
            place = (
                self._of_hub(model) if model.is_of_hub else self._of_service(model, files, download)
            )
            if place is not None:
                self.places[model.prefix] = place
        return self.places

    def _check(self) -> None:
        if self.must_stop():
            raise GaveUpError("models")

    def _pause(self) -> None:
        self._check()
        time.sleep(LOOK_SECONDS)

    def _wait_for(self, model: NeededModel) -> None:
        self.note(f"waiting for another worker of this host, which downloads {model.what}")
        self._pause()

    # --- of the service

    def _of_service(
        self, model: NeededModel, files: Sequence[InputFile], download: Download
    ) -> Path:
        if model.checkpoint_id is None:
            own = local_folder(self.settings.models_path, model.name)
            if own is not None:
                return own
        mine = {
            file.name.removeprefix(f"{model.prefix}/"): file
            for file in files
            if file.name.startswith(f"{model.prefix}/")
        }
        if not mine:
            raise ModelNotFoundError(
                f"{model.what} was removed after the job was submitted: it is in the models "
                "directory of neither the service nor the worker; install it again, then resume "
                "the job",
                param=model.param,
            )
        listing = "\n".join(f"{name} {file.sha256}" for name, file in sorted(mine.items()))
        version = hashlib.sha256(listing.encode()).hexdigest()
        sizes = {name: file.bytes for name, file in mine.items()}

        def fill(folder: Path) -> None:
            for name, file in mine.items():
                target = safe_path(folder, name)
                if not (target.is_file() and target.stat().st_size == file.bytes):
                    download(file, target)

        return self._kept(
            model, ModelRecord(name=model.cached_as, version=version, files=sizes), fill
        )

    def _kept(self, model: NeededModel, record: ModelRecord, fill: Callable[[Path], None]) -> Path:
        """A model in the cache, downloaded by ``fill`` if it is not whole."""
        held = self._cache.hold(record, lambda: self._wait_for(model))
        folder = self.inputs / model.prefix if held is None else held.folder
        if held is not None:
            self.held.callback(held.release)
            if held.is_whole:
                return folder
        folder.mkdir(parents=True, exist_ok=True)
        lacks = bytes_to_arrive(folder, record.files)
        check_room(folder, lacks)
        log.info("downloading a model", model=record.name, bytes=lacks, kept=held is not None)
        self.note(f"downloading {model.what}, {lacks:,} bytes")
        fill(folder)
        if held is not None:
            self._cache.complete(held)
        return folder

    # --- of the hub

    def _of_hub(self, model: NeededModel) -> Path | None:
        """The folder of a hub model; None: only the cache of the hub's library may have it."""
        known = self._commits.get(model.name)
        is_offline = self.settings.is_offline
        if (known is not None or is_offline) and (place := self._cached(model, known)) is not None:
            return place
        if is_offline:
            return None
        with contextlib.closing(Hub(hub_token(self.settings), self._check)) as hub:
            try:
                return self._from_hub(model, known, hub)
            except HubUnreachableError as error:
                known = self._commits.get(
                    model.name
                )  # it may have broken off after the first answer
                place = self._cached(model, known) or self._snapshot(model, known)
                if place is None:
                    raise
                log.warning("the hub does not answer; this host has the model", why=error.message)
                return place

    def _from_hub(self, model: NeededModel, known: str | None, hub: Hub) -> Path:
        found = hub.find(model.name, model, known)
        commit = self._pinned(model, found.commit)
        if commit != found.commit:
            found = hub.find(model.name, model, commit)
        if (there := library_snapshot(model.name, commit, found.sizes)) is not None:
            return there

        def fill(folder: Path) -> None:
            for file in found.files:
                hub.download(model.name, model, commit, file, folder)

        record = ModelRecord(name=model.name, version=commit, files=found.sizes)
        return self._kept(model, record, fill)

    def _cached(self, model: NeededModel, commit: str | None) -> Path | None:
        """The model in this host's cache."""
        held = self._cache.take(model.name, commit)
        if held is None:
            return None
        self.held.callback(held.release)
        self._pinned(model, held.record.version)
        return held.folder

    def _snapshot(self, model: NeededModel, known: str | None) -> Path | None:
        """The model in the cache of the hub's library, as far as this host knows."""
        commit = known or library_main(model.name)
        folder = None if commit is None else library_snapshot(model.name, commit, None)
        if commit is not None and folder is not None:
            self._pinned(model, commit)
        return folder

    def _pinned(self, model: NeededModel, commit: str) -> str:
        """The commit with which the job was begun: this one, if it begins now."""
        if model.name in self._commits:
            return self._commits[model.name]
        said = PinRevisions(attempt=self.lease.attempt, revisions={model.name: commit})
        try:
            pinned = self.client.until_answered(
                lambda: self.client.pin(self.lease.lease_id, said),
                "commit of a model",
                give_up=self.must_stop,
            )
        except MissingError:  # a service of an earlier version
            pinned = RevisionsPinned(revisions={})
        self._commits[model.name] = pinned.revisions.get(model.name, commit)
        return self._commits[model.name]
