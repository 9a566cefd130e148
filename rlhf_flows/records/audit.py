"""The audit of a run: every planned row trained, filtered or quarantined exactly once.

The decision here: an audit believes no count that it can take itself. It draws what should be there
from the plans and the quarantine records alone, and holds files, commits and listings against that.
It changes nothing, and a run may go on meanwhile: only what is committed is looked at.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlhf_flows.data.plan import EpisodePlan
from rlhf_flows.data.quarantine import Blamed, Quarantine
from rlhf_flows.errors import ObjectNotFoundError, ShardDamageError, StoreDamageError
from rlhf_flows.records.commits import CommittedFolder, committed_folders
from rlhf_flows.records.finding import find_run
from rlhf_flows.records.sample_tables import read_shard
from rlhf_flows.store import (
    EpisodeState,
    ObjectStore,
    RunLayout,
    RunState,
    ShardPhase,
    fetch_folder,
    read_json,
    scan_keys,
)

__all__ = ["Audit", "EpisodeAudit", "Finding", "audit_run"]

_PHASES: tuple[ShardPhase, ...] = ("rollout", "scoring")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that does not add up."""

    where: str
    """`episode 3`, `version 4`, `evaluation of version 4`."""
    says: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeAudit:
    """Rows of all training passes over an episode, as its commit counts them, and of its files."""

    episode: int
    version: int
    attempt: int
    planned: int
    trained: int
    filtered: int
    quarantined: int
    sampled: int
    """Rows of the rollout files."""
    scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What an audit found."""

    run: str
    url: str
    episodes: tuple[EpisodeAudit, ...]
    """The trained ones."""
    evaluations: int
    folders: int
    """Of weights and state, that are there and have the files and sizes of their commits."""
    deleted: int
    """Folders that retention took."""
    digests: bool
    """Whether the bytes of the folders were read, too."""
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def audit_run(store: ObjectStore, run: str, *, digests: bool = False) -> Audit:
    """Audits a run: plans, samples, counts of training, checkpoints and evaluations.

    Args:
        digests: Read the folders of weights and state, too, and compare each file's SHA-256 with
            its commit; without it names and sizes are compared. Samples are read in any case, and
            checked by the digests in them.

    Raises:
        ConfigError: no such run.
        StoreError: the store does not answer.
    """
    find_run(store, run)
    sizes = {info.key: info.size for info in store.list(run)}
    return _Auditor(store, run, scan_keys(run, sizes), sizes, digests).audit()


class _Auditor:
    def __init__(
        self,
        store: ObjectStore,
        run: str,
        state: RunState,
        sizes: Mapping[str, int],
        digests: bool,
    ) -> None:
        self.store, self.run, self.state, self.sizes = store, run, state, sizes
        self.digests = digests
        self.layout = RunLayout(run)
        self.config = read_json(store, self.layout.run_json)["config"]
        self.findings: list[Finding] = []
        self.folders = self.deleted = 0
        # What some episode has, every trained one must have.
        found = state.episodes.values()
        self.phases = [p for p in _PHASES if any(getattr(e, p) for e in found)]

    def audit(self) -> Audit:
        episodes = [self._episode(e) for e in self.state.episodes.values() if e.trained]
        trained = [e.episode for e in episodes]
        if trained != list(range(len(trained))):
            self._find("the run", f"trained episodes are {trained}, expected each from 0 on")
        if not self.phases and "environment" in self.config["flows"] and trained:
            self._find("the run", "it has an environment, and there is no sample of any episode")
        done = [which for which, found in self.state.evaluations.items() if found.done]
        for version, digest in done:
            self._evaluation(version, digest)
        return Audit(
            run=self.run,
            url=f"{self.store.url}/{self.run}",
            episodes=tuple(episodes),
            evaluations=len(done),
            folders=self.folders,
            deleted=self.deleted,
            digests=self.digests,
            findings=tuple(self.findings),
        )

    def _find(self, where: str, says: str) -> None:
        self.findings.append(Finding(where=where, says=says))

    # ---- an episode -----------------------------------------------------------------------

    def _episode(self, state: EpisodeState) -> EpisodeAudit:
        where, number = f"episode {state.episode}", state.episode
        commit = read_json(self.store, self.layout.trained(number))
        rows = {"sampled": 0, "scored": 0}
        if not state.plans:
            self._find(where, "it is trained, and has no plan")
        else:
            plan, quarantine = self._planned(state)
            for phase, name in zip(_PHASES, rows, strict=True):
                if phase in self.phases:
                    rows[name] = self._shards(state, phase, plan, quarantine)
            self._counts(commit, plan, quarantine)
        for name in ("episode", "version"):
            if commit[name] != number + (name == "version"):
                self._find(where, f"its commit says {name} {commit[name]}")
        if commit["attempt"] not in self.state.attempts:
            self._find(where, f"it was committed by attempt {commit['attempt']}, which is none")
        for folder in committed_folders(commit):
            self._folder(folder)
        return EpisodeAudit(
            episode=number,
            version=commit["version"],
            attempt=commit["attempt"],
            **{name: commit["rows"][name] for name in commit["rows"]},
            **rows,
        )

    def _planned(self, state: EpisodeState) -> tuple[EpisodePlan, Quarantine]:
        generation = state.plans[0]
        key = self.layout.plan(state.episode, 0, generation)
        plan = EpisodePlan.from_json(read_json(self.store, key))
        blamed = [
            Blamed.from_json(
                read_json(self.store, self.layout.quarantine(state.episode, name, generation))
            )
            for name in state.quarantined
        ]
        return plan, Quarantine(plan, blamed)

    def _shards(
        self, state: EpisodeState, phase: ShardPhase, plan: EpisodePlan, quarantine: Quarantine
    ) -> int:
        """Holds the samples of a phase against the plan; how many there are."""
        where, count = f"episode {state.episode}", 0
        keys: Mapping[int, str] = getattr(state, phase)
        expected = {s.index: _flat(quarantine.kept(phase, s.index)) for s in plan.shards}
        for index in sorted({*keys, *expected}):
            wanted = expected.get(index, [])
            table = self._read(where, keys[index]) if index in keys else None
            found = [] if table is None else table["sample_id"].to_pylist()
            count += len(found)
            if wanted and index not in keys:
                self._find(where, f"{phase} shard {index} is missing: {len(wanted)} samples")
            elif table is not None:
                self._same(where, f"{phase} shard {index}", found, wanted)
                if phase == self.phases[0]:
                    self._versions(where, index, table, plan)
        return count

    def _read(self, where: str, key: str) -> pa.Table | None:
        try:
            return read_shard(self.store, key, ["policy_version"])
        except (ShardDamageError, ObjectNotFoundError) as e:
            self._find(where, str(e))
            return None

    def _same(self, where: str, what: str, found: list[str], wanted: list[str]) -> None:
        twice = sorted(name for name, times in Counter(found).items() if times > 1)
        missing, more = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
        for names, says in (
            (twice, "are there more than once"),
            (missing, "are planned and not there"),
            (more, "are there and not planned, or quarantined"),
        ):
            if names:
                self._find(where, f"{what}: {len(names)} samples {says}, such as {names[0]}")

    def _versions(self, where: str, index: int, table: pa.Table, plan: EpisodePlan) -> None:
        if "policy_version" not in table.column_names or not plan.versions:
            return
        wrong = {*table["policy_version"].to_pylist()} - {*plan.versions.values()}
        if wrong:
            self._find(
                where,
                f"shard {index} was sampled from version {sorted(wrong)}, its plan names"
                f" {sorted({*plan.versions.values()})}",
            )

    def _counts(self, commit: Mapping[str, Any], plan: EpisodePlan, quarantine: Quarantine) -> None:
        where, rows = f"episode {plan.episode}", commit["rows"]
        given = rows["trained"] + rows["filtered"] + rows["quarantined"]
        if given != rows["planned"]:
            self._find(
                where,
                f"of {rows['planned']} planned rows {rows['trained']} were trained,"
                f" {rows['filtered']} filtered and {rows['quarantined']} quarantined: {given}",
            )
        blamed = sorted(record.sample_id for record in quarantine.blamed)
        if blamed != sorted(commit["quarantined"]):
            self._find(where, f"its commit names {commit['quarantined']} as quarantined: {blamed}")
        runtime = self.config["runtime"]
        if runtime["max_relay_episode"] and plan.episode >= runtime["relay_episode_offset"]:
            return  # a relay function said what was trained, not the plan
        passes = runtime["num_training_epoch"]
        for name, count in (
            ("planned", passes * plan.num_samples),
            ("quarantined", passes * quarantine.num_left_out()),
        ):
            if rows[name] != count:
                self._find(
                    where,
                    f"its commit counts {rows[name]} rows {name}, its plan has {count} in"
                    f" {passes} passes",
                )

    # ---- folders and evaluations ----------------------------------------------------------

    def _folder(self, folder: CommittedFolder) -> None:
        record = folder.record
        if record.prefix in self.state.deleted:
            self.deleted += 1
            return
        where = f"version {folder.version}"
        wrong = [
            file.name
            for file in record.files
            if self.sizes.get(f"{record.prefix}/{file.name}") != file.size
        ]
        if wrong:
            self._find(
                where,
                f"{folder.kind} of {folder.module!r}: {len(wrong)} of {len(record.files)} files are"
                f" missing or of another size, such as {record.prefix}/{wrong[0]}",
            )
            return
        self.folders += 1
        if self.digests:
            self._digests(where, folder)

    def _digests(self, where: str, folder: CommittedFolder) -> None:
        scratch = Path(tempfile.mkdtemp(prefix="rlhf-flows-audit-"))
        try:
            fetch_folder(self.store, folder.record, scratch)
        except (StoreDamageError, ObjectNotFoundError) as e:
            self._find(where, f"{folder.kind} of {folder.module!r}: {e}")
        finally:
            shutil.rmtree(scratch)

    def _evaluation(self, version: int, digest: str) -> None:
        where = f"evaluation of version {version}"
        done = read_json(self.store, self.layout.evaluation_done(version, digest))
        found: list[str] = []
        for key in self.state.evaluations[version, digest].shards.values():
            table = self._read(where, key)
            found += [] if table is None else table["sample_id"].to_pylist()
        if len(found) != len({*found}) or len(found) != done["rows"]:
            self._find(
                where,
                f"it counts {done['rows']} rows, its files have {len(found)}, {len({*found})} of"
                " them different",
            )


def _flat(groups: tuple[tuple[str, ...], ...]) -> list[str]:
    return [name for group in groups for name in group]
