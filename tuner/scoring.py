"""Score files: what the models of an evaluation say of a role, asked once, and every look at a role that is kept
back recorded before it happens.

    <runs>/<evaluation>/scores/<model>-<role>.safetensors     scores, and calibrated logits where there are any
    <runs>/<evaluation>/scores/<model>-ablation.safetensors   a metric on valid without each part of the model

A file is there whole or not at all, names what it was made from, and carries the SHA-256 of its arrays. One that is
damaged, or was made from something else, is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from models.trainer import InputError, Predictions, Role
from storage.artifacts import flush_folder
from storage.rows import LookRow, RunRow
from storage.runs import Store
from tuner.snapshots import disk_errors
from tuner.uploads import Uploads

log = logging.getLogger("tuner")

# The roles that a search never opens: whoever looks at them is written down.
GUARDED: frozenset[Role] = frozenset({"calibrate", "test"})

_FORMAT = "1"
_AGAIN = "/again-"  # behind the evaluation's name in a look at a model that it had looked at before


@dataclass(frozen=True)
class Model:
    """What is scored: a fit or a baseline. `name` names its files; `checksum` is the SHA-256 of its checkpoint, or
    of what determines a baseline."""

    name: str
    checksum: str


class Scoring:
    """The score files of one evaluation, and its looks.

    Args:
        folder: of the score files.
        data_hash: of the data that are scored; a file of other data is never taken.
    """

    def __init__(self, store: Store, folder: Path, data_hash: str, study: str, evaluation: str) -> None:
        self.store = store
        self.folder = folder
        self.data_hash = data_hash
        self.study = study
        self.evaluation = evaluation

    def scores(self, model: Model, role: Role, n_rows: int, predict: Callable[[], Predictions]) -> Predictions:
        """What a model says of a role: from its file, else by `predict`.

        Guarantees:
            `predict` is called only where no whole file is there; with a role that is kept back, only after its
            look is in the database. A look is closed once the file is durable. Who is killed in between finds the
            same look open; who has to score again what was durable before (a damaged file) opens a further one.

        Raises:
            InputError: the scores are not one finite number a row.
            DiskError: the disk is full or read-only.
        """
        path = self.folder / f"{model.name}-{role}.safetensors"
        identity = self._identity(model, role)
        found = _predictions(read_arrays(path, identity))
        if role not in GUARDED:
            return found or self._score(path, identity, n_rows, predict)
        look = self._look(model, role, again=found is None)
        if found is None:
            found = self._score(path, identity, n_rows, predict)
        if look.scored_at is None:
            self.store.close_look(look.id)
        return found

    def ablation(self, model: Model, metric: str, measure: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """A metric on valid without each part, by the part's name: from its file, else by `measure`."""
        path = self.folder / f"{model.name}-ablation.safetensors"
        identity = self._identity(model, "valid") | {"metric": metric}
        found = read_arrays(path, identity)
        if found is None:
            found = {name: np.array([value], np.float64) for name, value in measure().items()}
            write_arrays(path, found, identity)
        return {name: float(value[0]) for name, value in found.items()}

    def looks(self, role: Role) -> dict[str, int]:
        """How often a role has been looked at: by this evaluation (`n_looks` at `n_models` models), at a model once
        more, here or by another evaluation (`repeated`), and by anybody (`all_on_this_set`)."""
        everybody = self.store.looks(self.data_hash, role)
        ours = [look for look in everybody if self._is_ours(look.evaluation)]
        models = {look.model for look in ours}
        of_these = [look for look in everybody if look.model in models]
        return {
            "n_models": len(models),
            "n_looks": len(ours),
            "repeated": len(of_these) - len(models),
            "all_on_this_set": len(everybody),
        }

    def _identity(self, model: Model, role: Role) -> dict[str, str]:
        return {"format": _FORMAT, "checkpoint": model.checksum, "data_hash": self.data_hash, "role": role}

    def _is_ours(self, evaluation: str) -> bool:
        return evaluation == self.evaluation or evaluation.startswith(self.evaluation + _AGAIN)

    def _look(self, model: Model, role: Role, again: bool) -> LookRow:
        """The newest look of this evaluation at a model and a role; a further one where that is over and the model
        has to be asked `again`."""
        ours = [
            look
            for look in self.store.looks(self.data_hash, role)
            if look.model == model.checksum and self._is_ours(look.evaluation)
        ]
        if ours and not (again and ours[-1].scored_at is not None):
            return ours[-1]
        name = f"{self.evaluation}{_AGAIN}{len(ours)}" if ours else self.evaluation
        return self.store.open_look(self.data_hash, role, self.study, name, model.checksum)

    def _score(
        self, path: Path, identity: Mapping[str, str], n_rows: int, predict: Callable[[], Predictions]
    ) -> Predictions:
        predictions = predict()
        arrays = {f"scores/{task}": np.asarray(a, np.float32) for task, a in predictions.scores.items()}
        arrays |= {f"calibrated/{task}": np.asarray(a, np.float64) for task, a in predictions.calibrated.items()}
        for name, values in arrays.items():
            if values.shape != (n_rows,) or not np.isfinite(values).all():
                n_finite = int(np.isfinite(values).sum())
                raise InputError(
                    f"{path.name}: expected a finite number for each of {n_rows} rows in {name}, got {n_finite} in "
                    f"{list(values.shape)}; mend the trainer's predict"
                )
        write_arrays(path, arrays, identity)
        found = _predictions(arrays)
        assert found is not None
        return found


def _predictions(arrays: Mapping[str, np.ndarray] | None) -> Predictions | None:
    if arrays is None:
        return None
    below: dict[str, dict[str, np.ndarray]] = {"scores": {}, "calibrated": {}}
    for name in sorted(arrays):
        kind, _, task = name.partition("/")
        below[kind][task] = arrays[name]
    return Predictions(below["scores"], below["calibrated"])


# --- files -----------------------------------------------------------------------------------------------------


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], identity: Mapping[str, str]) -> None:
    """Store arrays under what they were made from. Atomic; durable on return. Raises DiskError."""
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    content = save(arrays, {**identity, "sha256": _digest(arrays)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path, "it"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(path.parent)


def read_arrays(path: Path, identity: Mapping[str, str]) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None where there is none, it is damaged, or it was made from something else."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("%s: damaged, made again: %s", path, error, extra={"action": "scores_damaged"})
        return None
    if metadata.get("sha256") != _digest(arrays):
        log.warning("%s: damaged, made again: its checksum differs", path, extra={"action": "scores_damaged"})
        return None
    other = [name for name, value in identity.items() if metadata.get(name) != value]
    if other:
        log.warning("%s: made from another %s, made again", path, other[0], extra={"action": "scores_stale"})
        return None
    return arrays


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, values.dtype.str, list(values.shape)]).encode())
        digest.update(memoryview(values).cast("B") if values.size else b"")
    return digest.hexdigest()


# --- checkpoints -----------------------------------------------------------------------------------------------


def find_checkpoint(run: RunRow, folder: Path, uploads: Uploads | None) -> Path:
    """The newest checkpoint of an ended run, brought from the artifact store where it is not here.

    Args:
        folder: the study's folder of runs.

    Raises:
        InputError: it is nowhere.
        ArtifactError, DiskError.
    """
    directory = folder / "trials" / f"{run.number:05d}"
    step = f"step-{run.checkpoint_step if run.checkpoint_step is not None else 0:05d}"
    attempts = dict.fromkeys(a for a in (run.checkpoint_attempt, run.uploaded_attempt) if a is not None)
    places = [directory / f"attempt-{attempt}" / step for attempt in attempts]
    found = next((place for place in places if place.exists()), None)
    if found is None and uploads is not None and run.uploaded_attempt is not None:
        uploads.restore(run.number, directory, (run.uploaded_attempt, run.uploaded_step or 0))
        found = next((place for place in places if place.exists()), None)
    if found is None:
        where = places[0] if places else directory
        raise InputError(
            f"{where}: expected the checkpoint of a fit, got nothing; evaluate on the machine that has it, or with "
            "the --artifacts that its worker had"
        )
    return found


def checksum_of(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint: of a file's content, or of the names and contents of a folder's files."""
    if checkpoint.is_file():
        return _file_digest(checkpoint)
    return _of_lines(
        f"{path.relative_to(checkpoint).as_posix()} {_file_digest(path)}"
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    )


def checksum_of_text(*parts: object) -> str:
    """SHA-256 of what determines a model that has no checkpoint."""
    return _of_lines(str(part) for part in parts)


def _of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
