"""The learner: corrections come in one by one, a frozen model's adapters learn them, and what was learned is protected.

Whatever changes the state is a record: acknowledged in the journal first, then applied in order. Recovery repeats the
records after the newest snapshot, so a run that was killed ends in the state of the one that was not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ogpstream.learner.apply import Report
from ogpstream.learner.assembly import Assembly
from ogpstream.learner.compilation import compile_kernels
from ogpstream.learner.config import LearnerConfig, ServedTo
from ogpstream.learner.encoding import Encoded, encode_prompt
from ogpstream.learner.errors import ConfigError
from ogpstream.learner.report import RehearsalReport, SampleReport
from ogpstream.learner.samples import DEFAULT_EXPERT, Message, Refused, Sample
from ogpstream.learner.status import live_status
from ogpstream.memory.units import exhausted

# inference steps after which new samples in the ring are consolidated (the specification's third trigger)
PERIOD = 1000

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
        self._take(Assembly.new(model, tokenizer, config or LearnerConfig(), state_dir, calibration), verifier)

    @classmethod
    def load_state(
        cls,
        state_dir: str | os.PathLike[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        verifier: Verifier | None = None,
        served_to: ServedTo | None = None,
    ) -> StreamLearner:
        """Continue from a state folder: newest valid snapshot, then the journal after it.

        Args:
            served_to: which prompts the experts answer from now on, in place of what the state says, and in
                its next snapshots; not "all" where there are several experts, each for prompts of its own.

        Raises:
            ConfigError: `served_to` does not fit.
            StateError: the folder is of another base model, damaged, in use, or cannot be written.
        """
        learner = cls.__new__(cls)
        learner._take(Assembly.load(state_dir, model, tokenizer, served_to), verifier)
        return learner

    def _take(self, parts: Assembly, verifier: Verifier | None) -> None:
        self._parts, self.verifier = parts, verifier
        self.config, self.attachment, self.state, self.queue = parts.config, parts.attachment, parts.state, parts.queue
        self._updater, self._applier = parts.updater, parts.queue.applier
        self._intake, self._roster, self._versions = parts.intake, parts.roster, parts.versions
        self.vocab_size, self.max_tokens = parts.intake.vocab_size, parts.intake.max_tokens
        self._steps = 0  # inference steps since the last period; no state: a restarted server counts anew

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

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self._intake.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._intake.tokenizer = tokenizer

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
    def pinned(self, prompt: str | Sequence[Message] | Sequence[int] | None = None) -> Iterator[int]:
        """Keep the served version for this thread or task, whatever is published meanwhile; gives its number.

        For a generation, whose forwards share a cache. Not across a `yield` of a generator.

        Args:
            prompt: what is asked, as in a `Sample` or as ids, where a forward does not read all of it, since a part is
                in a cache already: the experts that answer it then answer every forward. None looks at each one's
                `input_ids`.
        """
        binding = self.attachment.binding
        served = binding.current()
        assert served is not None
        names = None
        if prompt is not None and binding.gate is not None:
            names = binding.gate.answering(served, encode_prompt(prompt, self.tokenizer))
        with binding.using(served, names):
            yield served.version

    def answering(self, prompt: str | Sequence[Message] | Sequence[int]) -> tuple[str, ...]:
        """The served experts that answer a prompt, as in a `Sample` or as ids; none of them is the base model.

        With `served_to` "all" these are all. Else an expert answers prompts like those that it learned: see `Scope`.
        """
        served = self.attachment.binding.current()
        assert served is not None
        gate = self.attachment.binding.gate
        if gate is None:
            return served.experts
        names = gate.answering(served, encode_prompt(prompt, self.tokenizer))
        return tuple(name for name in served.experts if name in names)

    @property
    def experts(self) -> tuple[str, ...]:
        return self._roster.names

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
        return live_status(self.queue)

    def warm_up(self) -> None:
        """Compile the kernels of forwards and updates now, so that none is compiled inside an update.

        For the experts that there are, with held parts of any rank up to r_c (held parts without a bound: of the ranks
        that they have). One call at start, before an `IdleLoop` begins, and again after an expert was added or
        imported. Triton keeps what it compiled on disk. Nothing where Triton does not compute, as on a CPU.
        """
        compile_kernels(self._updater, tokens=self.max_tokens, vocabulary=self.vocab_size)

    # learning

    def encode(self, sample: Sample) -> Encoded:
        """Token ids of a sample for this model, cut to what fits `max_tokens` and the activation budget.

        Raises:
            SampleError: nothing can be learned from it, its completion does not fit, or its expert is unknown.
        """
        return self._intake.encode(sample)

    def learn_one(self, sample: Sample) -> SampleReport:
        """Learn one sample: one update, and one replayed sample with every 16th.

        Raises:
            SampleError: the sample is unusable; the state is unharmed.
            StateError: the state folder cannot be written. Where nothing is pending then, the sample was not taken;
                else it is kept, and the next call of any learning method goes on with it.
        """
        return exhausted(self.step(sample))

    def step(self, sample: Sample) -> Generator[str, None, SampleReport]:
        """`learn_one` as a generator that stops after every unit of work.

        The sample is acknowledged before the first unit. Closing the generator aborts the unit's update; the sample
        stays pending and is learned by the next call of any learning method.
        """
        return (yield from self._step(sample))

    def _step(self, sample: Sample, repeats: int = 0) -> Generator[str, None, SampleReport]:
        known = self._intake.accept_alone(sample, repeats)
        if known is not None:
            self.queue.last_report = known
            return known
        # others may wait before it, and come behind it between two units
        own = self.queue.newest(sample.id)
        report: Report = None
        while self.queue:
            number = self.queue.oldest
            done = yield from self.queue.apply_next()
            report = done if number == own else report
        assert isinstance(report, SampleReport)
        return report

    def accept(self, sample: Sample) -> int | SampleReport:
        """Acknowledge a sample, which is learned by the next call of any learning method.

        Returns:
            Its number in the journal; or what to tell of one that is not taken, because its id was brought before, or
            a guard refused it before.

        Raises:
            SampleError: the sample is unusable; the state is unharmed.
            StateError: the journal cannot be written: the sample is not taken.
        """
        return self._intake.accept(sample)

    def accept_rehearsal(self, updates: int | None = None, *, limit: int | None = None) -> bool:
        """Acknowledge a rehearsal, which is done by the next call of any learning method.

        Args:
            updates: on random samples; None is one for each sample that was not rehearsed yet.
            limit: the most updates, so that a new correction need not wait for all of them.

        Returns:
            False if there is nothing to rehearse.
        """
        return self._intake.accept_rehearsal(updates, limit)

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
        reports = []
        for plan in self._intake.accept_batch(samples, refuse=refuse):
            report = exhausted(self.queue.apply_next()) if isinstance(plan, dict) else plan
            assert isinstance(report, SampleReport)
            reports.append(report)
            if on_report is not None:
                on_report(report)
        return reports

    def correct(self, prompt: str, completion: str, *, expert: str = DEFAULT_EXPERT) -> SampleReport:
        """Trigger 1: a user says what the answer should have been; updated again until it is learned, by `repeats`.

        A sample that was learned before with the same prompt and another completion is not replayed any more.
        """
        sample = Sample(prompt=prompt, completion=completion, expert=expert, source="user")
        return exhausted(self._step(sample, self.config.repeats))

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

    def accept_refresh(self) -> bool:
        """Acknowledge a look at the next part of the ring, which is made by the next call of any learning method.

        Returns:
            False where a round found nothing forgotten, or many rounds did not end it.
        """
        return self._intake.accept_refresh()

    def refresh(self, *, on_report: Callable[[RehearsalReport], None] | None = None) -> RehearsalReport:
        """Rehearse what is forgotten: look at the samples of served experts, round after round, until all are known.

        It ends after 100 rounds without any other change, since some things may not be learnable beside others. A round
        of a full ring is 512 looks at 8 samples, forwards, and an update for each look that finds one forgotten. No
        expert restarts in it.

        Args:
            on_report: told after each look of all so far.

        Returns:
            What was `looked` at and `known` by this call alone: nothing where the last round was over before.
        """
        self.drain()
        whole = RehearsalReport(0, self.version, looked=0, known=0)
        seen: dict[int, tuple[int, int]] = {}
        while self.accept_refresh():
            report = self.drain()
            assert isinstance(report, RehearsalReport)
            seen[self.state.rounds.place] = report.looked, report.known
            looked, known = (sum(column) for column in zip(*seen.values(), strict=True))
            whole = RehearsalReport(whole.updates + report.updates, report.version, None,
                                    whole.admitted + report.admitted, looked, known)
            if on_report is not None:
                on_report(whole)
        return whole

    def drain(self) -> Report:
        """Apply everything that is acknowledged and pending; the report of the last record."""
        return exhausted(self.queue.drain())

    # experts

    def add_expert(self, name: str, *, rank: int | None = None) -> None:
        """A new expert that computes nothing yet.

        Raises:
            ConfigError: the name is taken or no name, or the rank does not fit the adapted linears.
        """
        self._roster.add(name, rank)

    def activate(self, gates: dict[str, float]) -> None:
        """Serve exactly these experts, with these gates, until a new sample is of another one.

        The old samples of the others rest: rehearsal serves nobody.

        Raises:
            ConfigError: one is unknown, or prompts are not routed and they are more than `max_active`.
        """
        self._roster.activate(gates)

    def freeze(self, name: str) -> None:
        """Let an expert be as it is: no update changes it, new samples of it are rejected, its old ones rest.

        It goes on answering. What it computes stays exactly, since nothing is folded or cut either; only `rollback`
        changes it.

        Raises:
            ConfigError: it is unknown.
        """
        self._roster.freeze(name, frozen=True)

    def unfreeze(self, name: str) -> None:
        """Let a frozen expert learn again.

        Raises:
            ConfigError: it is unknown.
        """
        self._roster.freeze(name, frozen=False)

    def export_peft(self, folder: str | os.PathLike[str], expert: str = DEFAULT_EXPERT, *, replace: bool = False
                    ) -> Path:
        """Write one expert, plastic and held part as one LoRA of rank r + r_c, as a PEFT adapter folder.

        Args:
            replace: an adapter that is there; anything else in its folder stays.

        Raises:
            StateError: the folder is not empty, or cannot be written.
        """
        return self._roster.export_peft(folder, expert, replace=replace)

    def export_experts(self, folder: str | os.PathLike[str], *, replace: bool = False) -> tuple[Path, ...]:
        """Write every expert as `export_peft` does, as PEFT lays out several adapters: `default` in the folder itself,
        each other one in a folder of its name inside. Returns the folders.

        Args:
            replace: the adapters that are there, and of other experts what an earlier export left and nobody changed;
                anything else stays.

        Raises:
            StateError: the folder is not empty, or cannot be written.
        """
        return self._roster.export_experts(folder, replace=replace)

    def import_peft(self, folder: str | os.PathLike[str], expert: str) -> None:
        """Take an adapter that was trained elsewhere as a new expert; it keeps its rank and can be trained on.

        Raises:
            StateError, ModelError: it cannot be read or does not fit the adapted linears.
            ConfigError: the name is taken, or no name.
        """
        self._roster.import_peft(folder, expert)

    # state

    def save_state(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Write a snapshot into the state folder, or a copy of the state into a new one.

        `load_state` continues either. A learner without a state folder keeps its latest two in memory.

        Raises:
            StateError: the folder cannot be written, or holds another state.
        """
        self._versions.save(folder)

    def versions(self) -> list[int]:
        """Versions that `rollback` can return to, oldest first."""
        return self._versions.saved()

    def rollback(self, version: int) -> None:
        """Return to a saved version, published as a new one; samples learned since go to quarantine.

        What is pending is learned before, and undone. A frozen expert goes back too, and stays frozen. Without a state
        folder the versions that are saved meanwhile may push out the one to return to.

        Raises:
            ConfigError: there is no such version, or not any more.
        """
        self._versions.return_to(version)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the state folder and take the adapters out of the model, as the end of a `with` does.

        Raises:
            StateError: the folder cannot be written. It is released, and has all that was acknowledged.
        """
        self.queue.check_reserved()
        self._parts.close()
