"""The learner: corrections come in one by one, a frozen model's adapters learn them, and what was learned is protected.

Whatever changes the state is a record: acknowledged in the journal first, then applied in order. Recovery repeats the
records after the newest snapshot, so a run that was killed ends in the state of the one that was not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ogpstream.learner import peft_io, warmstart
from ogpstream.learner.apply import Record, Report
from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.encoding import Encoded, encode
from ogpstream.learner.errors import ConfigError, ModelError, SampleError, StateError
from ogpstream.learner.folder import StateFolder
from ogpstream.learner.queue import RecordQueue
from ogpstream.learner.report import RehearsalReport, SampleReport
from ogpstream.learner.samples import EXPERT_NAME, Refused, Sample, refuse
from ogpstream.learner.sites import attach
from ogpstream.learner.state import SLOT_TOKENS, LearnerState, environment, fingerprint
from ogpstream.learner.units import exhausted
from ogpstream.learner.update import Updater
from ogpstream.memory.adapters import UnknownExpert
from ogpstream.memory.experts import Expert

DEFAULT_EXPERT = "default"
# inference steps after which new samples in the ring are consolidated (the specification's third trigger)
PERIOD = 1000

_REFUSED_BEFORE = "a guard refused it before, quarantine.jsonl says why; change it to have it tried again"

Verifier = Callable[[str, str], Sample | None]


class StreamLearner:
    """Learns single samples into LoRA experts of a frozen model, with what was learned protected.

    The model object stays the caller's: its adapted linears serve the newest version at once. Not thread-safe: one
    thread learns; others may run forwards of the model meanwhile. In a server an `IdleLoop` learns, and others reach
    the learner through it.

    Args:
        model: a decoder of transformers without PEFT layers; frozen and put in eval mode.
        tokenizer: needed for samples given as text; its bos starts the model's own samples.
        state_dir: where to journal and save; None keeps everything in memory. It must hold no state: `load_state`
            continues one.
        calibration: texts the base model should stay good at, for the warm start; None uses its own samples.
        verifier: called by `observe` with (prompt, answer); returns a corrected sample for an answer it rejects.

    Raises:
        ConfigError, ModelError, StateError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: LearnerConfig | None = None,
        *,
        state_dir: str | os.PathLike[str] | None = None,
        calibration: Sequence[str] | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self._build(model, tokenizer, config or LearnerConfig(), verifier)
        try:
            if state_dir is not None:
                self._applier.folder = folder = StateFolder(state_dir)
                if not folder.empty:
                    raise StateError(f"{state_dir} holds a state already: continue it with StreamLearner.load_state")
            if self.config.warm_start and self.config.guard == "fold":
                self._warm_start(calibration)
            self._applier.adopt(DEFAULT_EXPERT, self.config.rank, self.config.scaling)
            self._applier.serve({DEFAULT_EXPERT: 1.0})
            self.save_state()
        except BaseException:
            self.close()
            raise

    @classmethod
    def load_state(
        cls,
        state_dir: str | os.PathLike[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        verifier: Verifier | None = None,
    ) -> StreamLearner:
        """Continue from a state folder: newest valid snapshot, then the journal after it.

        Raises:
            StateError: the folder is of another base model, damaged, in use, or cannot be written.
        """
        folder = StateFolder(state_dir)
        try:
            snapshot = folder.load()
            learner = cls.__new__(cls)
            learner._build(model, tokenizer, LearnerConfig.from_dict(snapshot.meta["config"]), verifier)
            learner._applier.folder = folder
            try:
                learner._applier.restore(snapshot.tensors, snapshot.meta)
                learner.queue.enqueue(folder.records(learner.state.position.seq))
                learner.drain()
            except BaseException:
                learner.attachment.detach()
                raise
        except BaseException:
            folder.close()
            raise
        return learner

    def _build(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: LearnerConfig,
        verifier: Verifier | None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.verifier = verifier
        modules = config.target_modules
        self.attachment = attach(
            model,
            rank=config.rank,
            target_modules=list(modules) if isinstance(modules, tuple) else modules,
            basis_scope=config.basis_scope,
        )
        text = model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        positions = getattr(text, "max_position_embeddings", None) or SLOT_TOKENS
        self.max_tokens: int = min(config.max_tokens, positions, SLOT_TOKENS)
        self.state = LearnerState.fresh(self.attachment, config)
        self._updater = Updater(self.attachment, self.state.store, self.state.protection, config)
        own = {"config": config.to_dict(), "base": fingerprint(model), "environment": environment(model),
               "model": {"name": model.config.name_or_path, "dtype": str(model.dtype).removeprefix("torch.")}}
        self.queue = RecordQueue(self.state, self._updater, config, own)
        self._applier = self.queue.applier
        self._steps = 0  # inference steps since the last period; no state: a restarted server counts anew
        try:
            # not id 0: often the padding, whose embedding is zero and whose logits say nothing
            ids = torch.tensor([[self.vocab_size // 3, self.vocab_size // 2]], device=model.device)
            self._updater.walk.check(ids)
            # now, and not when the first sample has come: a server is waiting then
            _ = self._updater.preflight.footprint
        except ModelError:
            self.attachment.detach()
            raise

    # what users set

    @property
    def update_budget_ms(self) -> float | None:
        """Milliseconds that the units of one update may take; None, as at the start, is without a bound.

        An update that would take longer is made with less of the prompts, or of the top decoder layers alone; `pace`
        in its report says of how many. The choice is journaled before it is made, so recovery repeats it, on whatever
        machine; without a choice in the journal it makes whole updates.

        Raises:
            ConfigError: not above 0.
        """
        return self._applier.pacer.budget_ms

    @update_budget_ms.setter
    def update_budget_ms(self, budget: float | None) -> None:
        self._applier.pacer.budget_ms = budget

    # what users read

    @property
    def model(self) -> PreTrainedModel:
        """The caller's model; its adapted linears compute with the version that is served."""
        return self.attachment.model

    @property
    def version(self) -> int:
        """Of the adapters that are served; each publish counts one up."""
        served = self.state.store.served
        return served.version

    @contextmanager
    def pinned(self) -> Iterator[int]:
        """Keep the served version for this thread or task, whatever is published meanwhile; gives its number.

        For a generation, whose forwards share a cache. Not across a `yield` of a generator.
        """
        served = self.attachment.binding.current()
        assert served is not None
        with self.attachment.binding.using(served):
            yield served.version

    @property
    def experts(self) -> tuple[str, ...]:
        return self.state.store.names

    @property
    def pending(self) -> int:
        """Acknowledged records that are not, or not wholly, applied."""
        return len(self.queue)

    @property
    def last_report(self) -> SampleReport | None:
        """Of the newest sample that was learned, rejected or skipped."""
        return self.queue.last_report

    def state_sha256(self) -> str:
        """Hash of the whole state; equal for equal histories on the same build, device and thread count."""
        return self.state.sha256()

    def state_bytes(self) -> int:
        """Bytes of masters, moments, held parts, bases and ring."""
        tensors, _ = self.state.capture()
        return sum(t.nbytes for t in tensors.values())

    def status(self) -> dict[str, Any]:
        """The fields of `ogpstream status`."""
        counters = self.state.counters
        return {
            "healthy": True,
            "acknowledged": counters.acknowledged,
            "learned": counters.learned,
            "rejected": counters.rejected,
            "quarantined": counters.quarantined,
            "pending": self.pending,
            "version": self.version,
            "updates": counters.updates,
            "basis_columns": self.state.protection.columns,
            "ring_samples": len(self.state.ring),
            "experts": list(self.experts),
            "held_discarded": max(max(self._expert(name).discarded) for name in self.experts),
            "versions": self.versions(),
            **self._applier.folder.sizes(),
            "state_sha256": self.state_sha256(),
        }

    def warm_up(self) -> None:
        """Compile the kernels of forwards and updates now, so that none is compiled inside an update.

        For the experts that there are, with held parts of any rank up to r_c (held parts without a bound: of the ranks
        that they have). One call at start, before an `IdleLoop` begins, and again after an expert was added or
        imported. Triton keeps what it compiled on disk. Nothing where Triton does not compute, as on a CPU.
        """
        from itertools import combinations_with_replacement

        from ogpstream.kernels import dispatch

        model, config, store = self.model, self.config, self.state.store

        def compiled(dtype: torch.dtype, *operations: str) -> bool:
            here = torch.empty(0, dtype=dtype, device=model.device)
            return any(dispatch.backend_for(here, operation).name == "triton" for operation in operations)

        of_linears = compiled(model.dtype, "lora_forward", "lora_backward")
        of_loss = compiled(model.dtype, "cross_entropy")
        experts = [store.expert(name) for name in store.names]
        widths = sorted(max([config.held_rank or 0, *(held.rank for held in expert.held)]) + expert.rank
                        for expert in experts)
        ranks, most, step = {expert.rank for expert in experts}, sum(widths[-config.max_active:]), store.multiple
        columns = range(-(-min(ranks) // step) * step, most + step, step)
        # an expert's columns come after those of the others that are active with it
        starts = {sum(before) for n in range(config.max_active)
                  for before in combinations_with_replacement(sorted(ranks), n)}
        shapes = [(site.d_in, site.d_out, R, slice(start, start + rank))
                  for site in store.sites for R in columns for rank in ranks for start in starts if start + rank <= R]
        if of_linears or of_loss:
            from ogpstream.kernels.warm_up import warm_up

            warm_up(shapes if of_linears else [], dtype=model.dtype, device=model.device, tokens=self.max_tokens,
                    vocabulary=self.vocab_size if of_loss else None)
        if compiled(store.dtype, "sgd_", "adam_", "project_out_"):
            for rank in ranks:
                self._updater.proposer.warm_up(store.layout(rank))

    # learning

    def encode(self, sample: Sample) -> Encoded:
        """Token ids of a sample for this model, cut to what fits `max_tokens` and the activation budget.

        Raises:
            SampleError: nothing can be learned from it, its completion does not fit, or its expert is unknown.
        """
        if sample.expert not in self.experts:
            raise SampleError(f"unknown expert {sample.expert!r}: known are {', '.join(self.experts)}; "
                              "add it, by `learn --add-expert` or by add_expert")
        if self.tokenizer is None and sample.prompt_ids is None:
            raise SampleError("the learner was made without a tokenizer: give prompt_ids and completion_ids")
        encoded = self._encode(sample, self.max_tokens)
        preflight, rows, tokens = self._updater.preflight, encoded.completion_length, len(encoded.ids)
        fits = preflight.longest(tokens, rows)
        if not fits:
            needed = preflight.smallest(rows + 1, rows).peak_bytes
            refuse(f"the completion has {rows} tokens, which need {needed} bytes of activations, over the budget of "
                   f"{preflight.limit}",
                   f"set activation_budget_mib to {-(-needed // 2**20)} or more, or split the completion")
        return encoded if fits == tokens else self._encode(sample, fits)

    def _encode(self, sample: Sample, max_tokens: int) -> Encoded:
        return encode(sample, self.tokenizer, vocab_size=self.vocab_size, max_tokens=max_tokens,
                      append_eos=self.config.append_eos)

    def learn_one(self, sample: Sample) -> SampleReport:
        """Learn one sample: one update, and one replayed sample with every 16th.

        Raises:
            SampleError: the sample is unusable; the state is unharmed.
        """
        return exhausted(self.step(sample))

    def step(self, sample: Sample) -> Generator[str, None, SampleReport]:
        """`learn_one` as a generator that stops after every unit of work.

        The sample is acknowledged before the first unit. Closing the generator aborts the unit's update; the sample
        stays pending and is learned by the next call of any learning method.
        """
        known = self._known(sample)
        if known is not None:
            self.queue.last_report = known
            return known
        if not self._waits(sample):
            self.queue.acknowledge([self._record(sample, rehearsals=0, repeats=0)])
        report: Report = None
        while self.queue:
            done = yield from self.queue.apply_next()
            report = done if isinstance(done, SampleReport) else report
        assert isinstance(report, SampleReport)
        return report

    def accept(self, sample: Sample) -> int | SampleReport:
        """Acknowledge a sample, which is learned by the next call of any learning method.

        Returns:
            Its number in the journal; or what to tell of one that is not taken, because its id was brought before, or
            a guard refused it before.

        Raises:
            SampleError: the sample is unusable; the state is unharmed.
            StateError: the journal cannot be written.
        """
        known = self._known(sample)
        if known is None and self._waits(sample):
            known = SampleReport(sample.id, "skipped", self.version)
        if known is not None:
            return known
        number = self.queue.acknowledge([self._record(sample, rehearsals=0, repeats=self.config.repeats)])
        assert number is not None
        return number

    def accept_rehearsal(self, updates: int | None = None, *, limit: int | None = None) -> bool:
        """Acknowledge a rehearsal, which is done by the next call of any learning method.

        Args:
            updates: on random samples; None is one for each sample that was not rehearsed yet.
            limit: the most updates, so that a new correction need not wait for all of them.

        Returns:
            False if there is nothing to rehearse.
        """
        count = len(self.state.unrehearsed()) if updates is None else updates
        count = count if limit is None else min(count, limit)
        if not count or not len(self.state.ring):
            return False
        self.queue.acknowledge([{"kind": "rehearse", "updates": count, "waiting_only": updates is None}])
        return True

    def learn_batch(self, samples: Iterable[Sample | Refused], *, refuse: bool = False,
                    on_report: Callable[[SampleReport], None] | None = None) -> list[SampleReport]:
        """Learn samples one after the other, with `config.rehearsals` updates on old samples after each.

        All are acknowledged together first. One whose id was brought before, or an earlier one of them has, is
        skipped. What was refused before is tried again unless it was a guard that refused it; refused once more, it
        is told again and not counted again.

        Args:
            samples: a `Refused` stands for a line of a stream that is no sample.
            refuse: record unusable samples as refused instead of raising.
            on_report: told of each sample as soon as it is done.

        Returns:
            A report of each sample, in their order.

        Raises:
            SampleError: one of them is unusable; none of them is acknowledged then.
        """
        self.drain()
        planned: list[Record | SampleReport] = []
        taken: set[str] = set()
        for sample in samples:
            known = SampleReport(sample.id, "skipped", self.version) if sample.id in taken else None
            plan = known or self._plan(sample, refuse=refuse)
            planned.append(plan)
            if isinstance(plan, dict) and sample.id is not None:
                taken.add(sample.id)
        self.queue.acknowledge([plan for plan in planned if isinstance(plan, dict)])
        reports = []
        for plan in planned:
            report = exhausted(self.queue.apply_next()) if isinstance(plan, dict) else plan
            assert isinstance(report, SampleReport)
            reports.append(report)
            if on_report is not None:
                on_report(report)
        return reports

    def correct(self, prompt: str, completion: str, *, expert: str = DEFAULT_EXPERT) -> SampleReport:
        """Trigger 1: a user says what the answer should have been."""
        return self.learn_one(Sample(prompt=prompt, completion=completion, expert=expert, source="user"))

    def observe(self, steps: int = 1, *, prompt: str | None = None, answer: str | None = None) -> SampleReport | None:
        """Tell of served requests: triggers 2 and 3.

        The verifier, if there is one, looks at (prompt, answer) and may give a correction, which is learned. After
        every 1000 inference steps the ring is consolidated if it has new samples.

        Returns:
            The report of a correction that was learned.
        """
        report = None
        if self.verifier is not None and prompt is not None and answer is not None:
            correction = self.verifier(prompt, answer)
            if correction is not None:
                report = self.learn_one(correction)
        self._steps += steps
        if self._steps >= PERIOD:
            self._steps %= PERIOD
            # does nothing where every sample of the ring was rehearsed
            self.consolidate()
        return report

    def consolidate(self, updates: int | None = None) -> RehearsalReport:
        """Rehearse samples of the ring: by default each that was not rehearsed yet, or the given number of updates.

        What is learned by then joins P. The idle time of a server is the place for it.
        """
        if updates is not None and updates < 0:
            raise ConfigError(f"updates is {updates}: give 0 or more, or nothing for all that waits")
        self.drain()
        if not self.accept_rehearsal(updates):
            return RehearsalReport(0, self.version)
        report = self.drain()
        assert isinstance(report, RehearsalReport)
        return report

    def drain(self) -> Report:
        """Apply everything that is acknowledged and pending; the report of the last record."""
        return exhausted(self.queue.drain())

    # experts

    def add_expert(self, name: str, *, rank: int | None = None) -> None:
        """A new expert that computes nothing yet.

        Raises:
            ConfigError: the name is taken or no name, or the rank does not fit the adapted linears.
        """
        rank = self.config.rank if rank is None else rank
        self._check_new(name)
        narrowest = min(min(site.d_in, site.d_out) for site in self.attachment.shapes)
        if not 1 <= rank <= narrowest:
            raise ConfigError(f"rank is {rank}: an expert of this model has a rank of 1 to {narrowest}")
        self.queue.acknowledge([{"kind": "expert", "name": name, "rank": rank}])
        self.drain()

    def activate(self, gates: dict[str, float]) -> None:
        """Serve exactly these experts, with these gates.

        Raises:
            ConfigError: one is unknown, or they are more than `max_active`.
        """
        unknown = sorted(set(gates) - set(self.experts))
        if unknown or not 0 < len(gates) <= self.config.max_active:
            raise ConfigError(f"cannot serve {', '.join(gates) or 'nothing'}: give 1 to {self.config.max_active} of "
                              f"{', '.join(self.experts)}")
        for name, gate in gates.items():
            if not math.isfinite(gate):
                raise ConfigError(f"the gate of {name} is {gate}: it must be a finite number")
        self.queue.acknowledge([{"kind": "activate", "gates": gates}])
        self.drain()

    def export_peft(self, folder: str | os.PathLike[str], expert: str = DEFAULT_EXPERT, *, replace: bool = False
                    ) -> Path:
        """Write one expert, plastic and held part as one LoRA of rank r + r_c, as a PEFT adapter folder.

        Args:
            replace: an adapter that is there; anything else never is.

        Raises:
            StateError: the folder is not empty, or cannot be written.
        """
        source = self._expert(expert)
        factors = []
        for index in range(len(self.attachment.sites)):
            held = source.held[index]
            factors.append((torch.cat([source.a(index), held.U], 1),
                            torch.cat([source.scaling * source.b(index), held.V], 0)))
        name = self.model.config.name_or_path
        peft_io.export_adapter(folder, model=self.model, attachment=self.attachment, factors=factors,
                               base_model_name=name, replace=replace,
                               about=f"expert `{expert}` as of version {self.version}, after "
                                     f"{self.state.counters.learned} samples that were learned by all experts together")
        return Path(folder)

    def import_peft(self, folder: str | os.PathLike[str], expert: str) -> None:
        """Take an adapter that was trained elsewhere as a new expert; it keeps its rank and can be trained on.

        Raises:
            StateError, ModelError: it cannot be read or does not fit the adapted linears.
            ConfigError: the name is taken, or no name.
        """
        self._check_new(expert)
        peft_io.read_adapter(folder, self.attachment)
        # the journal names the adapter, so the state folder keeps a copy of it
        source = self._applier.folder.keep_import(Path(folder), expert)
        self.queue.acknowledge([{"kind": "import", "name": expert, "folder": source}])
        self.drain()

    # state

    def save_state(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Write a snapshot into the state folder, or a copy of the state into a new one.

        `load_state` continues either. A learner without a state folder keeps its latest two in memory.

        Raises:
            StateError: the folder cannot be written, or holds another state.
        """
        self.queue.check_reserved()
        if folder is None:
            self._applier.checkpoint()
            return
        other = StateFolder(folder)
        try:
            if not other.empty:
                raise StateError(f"{folder} holds a state already: choose another folder")
            self.drain()
            tensors, meta = self._applier.capture()
            # its journal starts anew
            other.save(self.version, tensors, {**meta, "position": {"seq": 0, "done": 0}})
        finally:
            other.close()

    def versions(self) -> list[int]:
        """Versions that `rollback` can return to, oldest first."""
        return self._applier.folder.versions()

    def rollback(self, version: int) -> None:
        """Return to a saved version, published as a new one; samples learned since go to quarantine.

        Raises:
            StateError: there is no such version.
        """
        if version not in self.versions():
            raise StateError(f"no version {version} to return to: there are {', '.join(map(str, self.versions()))}")
        # kept for as long as the journal may repeat this rollback
        self._applier.folder.pin(version, "rollback")
        self.queue.acknowledge([{"kind": "rollback", "to": version}])
        self.drain()
        self.save_state()

    def close(self) -> None:
        """Release the state folder and take the adapters out of the model."""
        self.queue.check_reserved()
        self._applier.folder.close()
        self.attachment.detach()

    # what samples and names become

    def _record(self, sample: Sample, *, rehearsals: int, repeats: int) -> Record:
        if not sample.trained:
            return {"kind": "kept", "id": sample.id, "reason": "marked as wrong by its source",
                    "sample": sample.to_dict()}
        encoded = self.encode(sample)
        return {"kind": "sample", "id": sample.id, "digest": sample.digest, "ids": list(encoded.ids),
                "prompt_length": encoded.prompt_length,
                "expert": encoded.expert, "cut": encoded.cut, "rehearsals": rehearsals, "repeats": repeats,
                # for a person who reviews what was refused or undone
                "source": sample.source, "meta": sample.meta}

    def _plan(self, sample: Sample | Refused, *, refuse: bool) -> Record | SampleReport:
        """The record of one sample of a batch, or the report of one that makes none."""
        if isinstance(sample, Refused):
            reason = sample.reason
        else:
            known = self._known(sample)
            if known is not None:
                return known
            try:
                return self._record(sample, rehearsals=self.config.rehearsals, repeats=self.config.repeats)
            except SampleError as error:
                if not refuse:
                    raise
                reason = str(error)
        if sample.id is not None and sample.id in self.state.refused:
            return SampleReport(sample.id, "rejected", self.version, reason=reason)
        return {"kind": "refused", "id": sample.id, "reason": reason}

    def _known(self, sample: Sample) -> SampleReport | None:
        """What to tell of a sample that there is nothing left to do for; None for any other."""
        if sample.id is None:
            return None
        if sample.id in self.state.seen:
            return SampleReport(sample.id, "skipped", self.version)
        if sample.digest in self.state.refused:
            return SampleReport(sample.id, "rejected", self.version, reason=_REFUSED_BEFORE)
        return None

    def _waits(self, sample: Sample) -> bool:
        """Whether an aborted step, or a loop that has not come to it, has left a sample of this id pending."""
        return sample.id is not None and self.queue.holds(sample.id)

    def _check_new(self, name: str) -> None:
        if not EXPERT_NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name of an expert: use letters, digits, '_' and '-'")
        if name in self.experts:
            raise ConfigError(f"there is an expert {name!r} already")

    def _expert(self, name: str) -> Expert:
        try:
            return self.state.store.expert(name)
        except UnknownExpert as error:
            raise ConfigError(str(error)) from None

    def _warm_start(self, calibration: Sequence[str] | None) -> None:
        """Protect what the base model uses on calibration texts, or on samples of its own."""
        texts = warmstart.calibration_ids(self.attachment, self.tokenizer, self.config, calibration, self.max_tokens)
        self.state.protection.warm_start(warmstart.input_covariances(self.attachment, texts))
