"""From the ended fits of an evaluation to its document: which arm is better, which model may be used, how sure.

The order is the promise. Every fit is scored on valid; the nominee and its sequence of thresholds are fixed in the
database; only then test is opened, and calibrate for the nominee alone. Whatever was durable when a conclusion was
killed is taken up by the next one, which comes to the same document.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import BASELINES
from models.baselines import single_feature_pr_auc
from models.bootstrap import Draws, Scores, resample
from models.certificate import Certificate, certify, joint_confidence, plan_sequence, share_of_delta
from models.certificate import Sequence as Thresholds
from models.check import check, hold
from models.precision import JudgedRows
from models.trainer import InputError, Predictions, Role
from storage.artifacts import open_artifacts
from storage.rows import EvaluationRow
from tuner import registry
from tuner.crew import choose_devices
from tuner.document import Findings, finite, write_document
from tuner.fits import Baselines, Fit, OnValid, Rows, importance, on_valid, rank_metrics, scores_of
from tuner.judged_metric import LABELS, metric_of_study
from tuner.plan import Plan
from tuner.scoring import Model, Scoring, checksum_of, checksum_of_text, find_checkpoint
from tuner.snapshots import disk_errors
from tuner.study import Study
from tuner.uploads import Uploads

if TYPE_CHECKING:
    from tuner.evaluation import EvaluateOptions

SHOWN_FEATURES = 20
Say = Callable[[str], None]


def conclude(
    study: Study,
    evaluation: EvaluationRow,
    fits: Study,
    plan: Plan,
    trainer: Any,
    data_of: Callable[[frozenset[Role]], Any],
    options: EvaluateOptions,
    say: Say,
) -> dict[str, Any]:
    """Score the fits, fix the nominee, certify it, judge the arms, export the nominee; store the document.

    Args:
        study: that was searched.
        fits: the evaluation's study, all of whose trials have ended.
        plan: the evaluation's (tuner.evaluation.Plan).
        data_of: opens roles of the data.
        options: of `tuner evaluate`: runs, artifacts, devices.

    Returns:
        The document, as stored.

    Raises:
        InputError: no fit is complete; the data are others than the plan's; a checkpoint is missing or damaged.
        StorageError, ArtifactError, DiskError.

    Guarantees:
        Idempotent and killable: a role that is kept back is looked at once a model, a certificate is issued once,
        and the document differs in times alone.
    """
    return _Conclusion(study, evaluation, fits, plan, trainer, data_of, options, say).reach()


class _Conclusion:
    """The stages of one conclusion, in their order."""

    def __init__(
        self, study: Study, evaluation: EvaluationRow, fits: Study, plan: Plan, trainer: Any,
        data_of: Callable[[frozenset[Role]], Any], options: EvaluateOptions, say: Say,
    ) -> None:  # fmt: skip
        self.study, self.evaluation, self.fits, self.plan = study, evaluation, fits, plan
        self.trainer, self.options, self.say = trainer, options, say
        self.store, self.spec, self.decision = study.store, study.spec, study.spec.decision
        self.task = self.decision.task
        self.metric = metric_of_study(self.spec.objective, self.task)
        self.folder = Path(options.runs) / evaluation.name
        self.device = _device(options.devices)
        self.scoring = Scoring(self.store, self.folder / "scores", plan.data_hash, study.name, evaluation.name)
        self._data_of = data_of

    def reach(self) -> dict[str, Any]:
        judged, left_out = self._complete_fits()
        search_data = self._open("train", "valid")
        baselines = Baselines(
            self.trainer, search_data, self.decision, self.metric, self.spec.seed, self.device
        )  # fmt: skip
        valid_rows = self._rows(search_data, "valid")
        valid = self._judge_on_valid(judged, search_data, valid_rows, baselines)
        nominees = self._fix_nominees(judged, valid, search_data, valid_rows)
        leak = self._leak(search_data)
        parts = self._importance(judged[nominees[0]["arm"]], valid, search_data, valid_rows)

        test_data = self._open("test")
        rows = self._rows(test_data, "test")
        scores = self._score_test(judged, valid, test_data, baselines, rows)
        certified = self._certify_all(nominees, judged, valid, scores, rows)
        findings = Findings(
            judged=judged, left_out=left_out, valid=valid, rows=rows, scores=scores,
            draws=self._resample(scores, rows), nominees=certified,
            looks={role: self.scoring.looks(role) for role in ("test", "calibrate")},
            leak=leak, importance=parts,
        )  # fmt: skip
        document = write_document(self.study, self.evaluation, self.fits, self.plan, findings)
        document["model"] = self._register(document, findings, search_data)
        document["finished_at"] = time.time()
        self.store.finish_evaluation(self.evaluation.id, document)
        return document

    # --- what there is -----------------------------------------------------------------------------------------

    def _open(self, *roles: Role) -> Any:
        data = self._data_of(frozenset(roles))
        if data.manifest.data_hash != self.plan.data_hash:
            raise InputError(
                f"evaluation {self.evaluation.name}: expected the data of its plan ({self.plan.data_hash[:12]}), "
                f"got others ({data.manifest.data_hash[:12]}); name the former ones with --data, or evaluate anew"
            )
        return data

    def _rows(self, data: Any, role: Role) -> Rows:
        rows = Rows.of(self.trainer.labels(data, role, self.decision), role, self.task)
        if self.metric == "roc_auc" and role != "calibrate" and rows.labels.all():
            raise InputError(
                f"{role}/{self.task}: expected a negative among {len(rows.labels)} rows for the ROC-AUC, got none; "
                "change the split"
            )
        return rows

    def _complete_fits(self) -> tuple[dict[str, list[Fit]], list[dict[str, str]]]:
        """The complete fits of every arm of the plan, by arm, and the arms that have none."""
        runs = {run.number: run for run in self.store.runs(self.fits.id)}
        uploads = None
        if self.options.artifacts:
            uploads = Uploads(open_artifacts(self.options.artifacts), self.fits.name)
        found: dict[str, list[Fit]] = {arm.name: [] for arm in self.plan.arms}
        names: dict[str, str] = {}  # equal checkpoints are one model, which is asked once
        for number in sorted(n for n, state in self._states.items() if state == "complete"):
            run = runs[number]
            checkpoint = find_checkpoint(run, self.folder, uploads)
            checksum = checksum_of(checkpoint)
            model = Model(names.setdefault(checksum, f"{number:05d}"), checksum)
            seed = self.fits.spec.seed_of(number)
            found[run.arm].append(Fit(run.arm, number, seed, model, run, checkpoint))
        left_out = [dict(entry) for entry in self.plan.left_out]
        for arm in [arm for arm, of_arm in found.items() if not of_arm]:
            del found[arm]
            reasons = [run.failure for run in runs.values() if run.arm == arm and run.failure]
            newest = f", the newest: {reasons[-1]}" if reasons else ""
            left_out.append({"arm": arm, "reason": f"none of its fits is complete{newest}"})
        if not self._searched(found):
            reasons = "; ".join(f"{entry['arm']}: {entry['reason']}" for entry in left_out)
            raise InputError(f"evaluation {self.evaluation.name}: expected a complete fit, got none ({reasons})")
        aim = () if self.metric == "pr_auc" else (self.metric,)  # left out, as before there was a choice
        for name in BASELINES:
            checksum = checksum_of_text("baseline", name, self.plan.data_hash, self.task, self.spec.seed, *aim)
            found[name] = [Fit(name, None, self.spec.seed, Model(f"baseline-{name}", checksum))]
        return found, left_out

    @cached_property
    def _states(self) -> dict[int, str]:
        return {trial.number: trial.state for trial in self.fits.search.trials()}

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return {arm.name: arm.kind for arm in self.plan.arms}

    def _searched(self, arms: Mapping[str, Any]) -> list[str]:
        return [arm for arm in arms if self._kinds.get(arm) == "searched"]

    # --- valid -------------------------------------------------------------------------------------------------

    def _predict(self, fit: Fit, data: Any, role: Role, baselines: Baselines | None = None) -> Predictions:
        """What a model says of a role, by its score file or newly."""

        def predict() -> Predictions:
            self.say(f"{role}: scoring {fit.title}")
            if fit.checkpoint is None:
                assert baselines is not None
                return baselines.predict(fit.arm, data, role)
            return self.trainer.predict(fit.checkpoint, data, role, self.device)

        return self.scoring.scores(fit.model, role, data.manifest.rows[role], predict)

    def _judge_on_valid(
        self, judged: Mapping[str, Sequence[Fit]], data: Any, rows: Rows, baselines: Baselines
    ) -> dict[str, OnValid]:
        """By the model's name."""
        found = {}
        for fit in (fit for fits in judged.values() for fit in fits):
            predictions = self._predict(fit, data, "valid", baselines)
            found[fit.model.name] = on_valid(predictions, rows, self.decision, self.spec.seed)
        return found

    def _fix_nominees(
        self, judged: Mapping[str, Sequence[Fit]], valid: Mapping[str, OnValid], data: Any, rows: Rows
    ) -> list[dict[str, Any]]:
        """Choose by valid alone and write it down once; what was written down before stays.

        Arms are ranked by the mean of their fits, those with a feasible fit first; of an arm its best fit, feasible
        ones first, is nominated.
        """

        def rank(fits: Sequence[Fit]) -> tuple[bool, float]:
            found = [valid[fit.model.name] for fit in fits]
            return any(v.feasible for v in found), float(np.mean([v.values[self.metric] for v in found]))

        arms = sorted(self._searched(judged), key=lambda arm: rank(judged[arm]), reverse=True)
        nominees = []
        for arm in arms[: self.plan.nominees]:
            fit = max(judged[arm], key=lambda fit: rank([fit]))
            logits = self._predict(fit, data, "valid").scores[self.task][rows.kept]
            # calibrate's own labels stay closed: as many of its rows are taken to have one as of valid's
            n_rows = round(data.manifest.rows["calibrate"] * len(rows.labels) / data.manifest.rows["valid"])
            sequence = plan_sequence(logits, rows.labels, rows.unit, self.decision, n_rows)
            nominees.append({
                "arm": arm, "number": fit.number, "seed": fit.seed, "checkpoint": fit.model.checksum,
                **valid[fit.model.name].as_entry(), "sequence": sequence.as_json(),
            })  # fmt: skip
        fixed = self.store.set_nominee(self.evaluation.id, {"nominees": nominees})["nominees"]
        for nominee in fixed:
            fit = self._fit_of(nominee, judged)
            if fit is None or fit.model.checksum != nominee["checkpoint"]:
                raise InputError(
                    f"evaluation {self.evaluation.name}: expected the checkpoint of its nominee (fit "
                    f"{nominee['number']}, {nominee['checkpoint'][:12]}), got another: it was damaged or replaced; "
                    "restore it, or begin another evaluation with another --top"
                )
            value = valid[fit.model.name].values[self.metric]
            self.say(f"nominee: {fit.title}, {LABELS[self.metric]} {value:.4f} on valid")
        return fixed

    def _fit_of(self, nominee: Mapping[str, Any], judged: Mapping[str, Sequence[Fit]]) -> Fit | None:
        return next((fit for fit in judged.get(nominee["arm"], ()) if fit.number == nominee["number"]), None)

    def _leak(self, data: Any) -> dict[str, Any]:
        """How far each feature alone gets: one that gets very far may know the answer."""
        roles: tuple[Role, Role] = ("train", "valid")
        labels = [self.trainer.labels(data, role, self.decision).tasks[self.task] for role in roles]
        train, valid = (self.trainer.features(data, role) for role in roles)
        ranked = single_feature_pr_auc(train, labels[0], valid, labels[1])
        return {
            "features": [[name, value] for name, value in ranked[:SHOWN_FEATURES]],
            "best": ranked[0][1] if ranked else None,
        }

    def _importance(
        self, fits: Sequence[Fit], valid: Mapping[str, OnValid], data: Any, rows: Rows
    ) -> dict[str, Any] | None:
        drops: dict[str, list[float]] = {}
        for fit in fits:

            def measure(fit: Fit = fit) -> dict[str, float]:
                self.say(f"valid: {fit.title} without each of its parts")
                parts = self.trainer.ablate(fit.checkpoint, data, "valid", self.decision, self.device)
                return {
                    f"{part.kind}/{part.name}": rank_metrics(rows.labels, part.scores[rows.kept])[self.metric]
                    for part in parts
                }

            for name, value in self.scoring.ablation(fit.model, self.metric, measure).items():
                drops.setdefault(name, []).append(valid[fit.model.name].values[self.metric] - value)
        return importance(fits[0].arm, "valid", drops)

    # --- test and calibrate ------------------------------------------------------------------------------------

    def _score_test(
        self, judged: Mapping[str, Sequence[Fit]], valid: Mapping[str, OnValid], data: Any, baselines: Baselines,
        rows: Rows,
    ) -> dict[str, list[Scores]]:  # fmt: skip
        return {
            arm: [
                scores_of(self._predict(fit, data, "test", baselines), rows, self.task, valid[fit.model.name])
                for fit in fits
            ]
            for arm, fits in judged.items()
        }

    def _certify_all(
        self, nominees: Sequence[dict[str, Any]], judged: Mapping[str, Sequence[Fit]],
        valid: Mapping[str, OnValid], scores: Mapping[str, Sequence[Scores]], rows: Rows,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The nominees with their certificates and what test says of them."""
        certified = []
        for nominee in nominees:
            fit = self._fit_of(nominee, judged)
            assert fit is not None
            content = self._certify(nominee, fit)
            certificate = Certificate.from_json(content)
            logits = scores[fit.arm][judged[fit.arm].index(fit)].logits
            kept = not_issued = None
            if certificate.threshold is None:
                not_issued = self._not_issued(valid[fit.model.name].search, logits, rows)
            else:
                found = check(certificate, logits, rows.labels, rows.unit)
                kept = found.as_json() | {"groups": rows.spread(logits >= np.float32(found.threshold))}
            certified.append({**nominee, "certificate": content, "check": kept, "not_issued": not_issued})
        return certified

    def _not_issued(self, search: Mapping[str, float], logits: np.ndarray, rows: Rows) -> dict[str, Any] | None:
        """What the threshold of the search, which nobody may use, does on test; None where it has none.

        Test was scored before, so this is no further look at it.
        """
        if "threshold" not in search:
            return None
        of_test = JudgedRows.of(rows.role, logits, rows.labels, rows.unit, self.decision.unit)
        found = hold(search["threshold"], self.decision.target_precision, of_test).as_json()
        del found["sentence"]  # it speaks of a promise
        spread = rows.spread(logits >= np.float32(search["threshold"]))
        return {"valid": dict(search), "test": found | {"groups": spread}}

    def _certify(self, nominee: Mapping[str, Any], fit: Fit) -> dict[str, Any]:
        """The nominee's certificate: issued once, whatever happens in between."""
        delta, hash_ = 1.0 - self.decision.confidence, self.plan.data_hash
        row = self.store.open_certificate(
            hash_, self.study.name, self.evaluation.name, fit.model.checksum,
            lambda number: share_of_delta(delta, self.plan.nominees, number),
        )  # fmt: skip
        if row.content is not None:
            return row.content
        data = self._open("calibrate")
        rows = self._rows(data, "calibrate")
        logits = self._predict(fit, data, "calibrate").scores[self.task][rows.kept]
        thresholds = Thresholds.from_json(nominee["sequence"])
        certificate = certify(logits, rows.labels, rows.unit, thresholds, self.decision, row.delta)
        spent = [other.delta for other in self.store.certificates(hash_) if other.number <= row.number]
        threshold = np.inf if certificate.threshold is None else certificate.threshold
        content = {
            **certificate.as_json(),
            "groups": rows.spread(logits >= np.float32(threshold)),
            "number_on_set": row.number,
            "delta_spent": row.delta,
            "joint_confidence": joint_confidence(spent),
        }
        self.store.issue_certificate(row.id, finite(content))
        issued = next(other for other in self.store.certificates(hash_) if other.id == row.id)
        self.say(f"certificate: {fit.title}: {certificate.status}")
        return issued.content

    def _resample(self, scores: Mapping[str, list[Scores]], rows: Rows) -> Draws:
        self.say(f"bootstrap: {self.plan.n_replicates} replicates over {self.decision.unit}, seeds included")
        told = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told
            if done / total >= told + 0.25:
                told = done / total
                self.say(f"bootstrap: {100 * done // total} %")

        return resample(rows.sample(), dict(scores), self.plan.n_replicates, self.spec.seed, progress)

    # --- the model ---------------------------------------------------------------------------------------------

    def _register(self, document: Mapping[str, Any], findings: Findings, data: Any) -> dict[str, Any]:
        """Export the first nominee that is certified, else the first, and add it to the registry as a candidate."""
        certified = (n for n in findings.nominees if n["certificate"]["status"] == "certified")
        nominee = next(certified, findings.nominees[0])
        fit = self._fit_of(nominee, findings.judged)
        assert fit is not None
        assert fit.checkpoint is not None
        folder = self.folder / "model"
        with disk_errors(folder, "it"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.trainer.export(fit.checkpoint, data, folder)
            (folder / registry.VERDICT).write_text(
                json.dumps(self._verdict_of(nominee, fit, document, findings), indent=1, allow_nan=False) + "\n"
            )
        row = registry.add_candidate(
            self.store, self.study.name, folder, dict(document), Path(self.options.runs), self.options.artifacts
        )
        self.say(f"model: {row.name}:{row.version} is a candidate")
        return {"name": row.name, "version": row.version, "checksum": row.checksum, "size_bytes": row.size_bytes}

    def _verdict_of(
        self, nominee: Mapping[str, Any], fit: Fit, document: Mapping[str, Any], findings: Findings
    ) -> dict[str, Any]:
        """What a model folder has beside the trainer's files: from its scores to decisions."""
        valid, metrics = findings.valid[fit.model.name], document["arms"][fit.arm]["metrics"]
        seed = findings.judged[fit.arm].index(fit)
        return {
            "format": registry.MODEL_FORMAT,
            "study": self.study.name,
            "evaluation": self.evaluation.name,
            "task": self.task,
            "calibrator": valid.calibrator.as_json(),
            "smearing": {task: dict(how) for task, how in valid.smearing.items()},
            "threshold": nominee["certificate"]["threshold"],
            "certificate": nominee["certificate"],
            "metrics": {name: found["per_seed"][seed] for name, found in metrics.items()},
        }


def _device(devices: str) -> str:
    """Where fits are scored: the first device asked for, the CPU where the evaluation has no workers of its own."""
    return "cpu" if devices in ("cpu", "none") else choose_devices(devices, None)[0]
