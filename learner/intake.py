"""The way in: a sample becomes a record that is acknowledged, or a report of why there is none to make."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from ogpstream.learner.encoding import Encoded, encode, max_positions
from ogpstream.learner.errors import SampleError
from ogpstream.learner.folder import Record
from ogpstream.learner.queue import RecordQueue
from ogpstream.learner.report import SampleReport
from ogpstream.learner.samples import Refused, Sample, refuse
from ogpstream.learner.state import SLOT_TOKENS

_REFUSED_BEFORE = "a guard refused it before, quarantine.jsonl says why; change it to have it tried again"


class Intake:
    """Takes samples in; whatever is taken is in the journal, and pending in the queue, when a method returns.

    Args:
        tokenizer: None takes samples as ids alone.

    Attributes:
        vocab_size: V, of the model.
        max_tokens: T, the most ids of a sample: what the configuration, the model's positions and a slot of the ring
            allow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, queue: RecordQueue) -> None:
        self.tokenizer = tokenizer
        self._queue = queue
        applier = queue.applier
        self._state, self._config, self._preflight = applier.state, applier.config, applier.updater.preflight
        model = applier.updater.attachment.model
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.max_tokens: int = min(self._config.max_tokens, max_positions(model), SLOT_TOKENS)

    def accept(self, sample: Sample) -> int | SampleReport:
        """See `StreamLearner.accept`."""
        known = self._known(sample)
        if known is None and self._waits(sample):
            known = self._skipped(sample)
        if known is not None:
            return known
        number = self._queue.acknowledge([self._record(sample, rehearsals=0, repeats=self._config.repeats)])
        assert number is not None
        return number

    def accept_alone(self, sample: Sample, repeats: int = 0) -> SampleReport | None:
        """Acknowledge a sample that has one update and no rehearsal; one of its id that is pending stands for it.

        Args:
            repeats: further updates, until it counts as learned.

        Returns:
            None; or what to tell of one that there is nothing left to do for.

        Raises:
            SampleError: the sample is unusable; the state is unharmed.
            StateError: the journal cannot be written: nothing is taken.
        """
        known = self._known(sample)
        if known is None and not self._waits(sample):
            self._queue.acknowledge([self._record(sample, rehearsals=0, repeats=repeats)])
        return known

    def accept_batch(self, samples: Iterable[Sample | Refused], *, refuse: bool) -> list[Record | SampleReport]:
        """Acknowledge samples together.

        Args:
            refuse: record unusable samples as refused instead of raising.

        Returns:
            Of each sample, in their order, the record that was acknowledged or the report of one that makes none.

        Raises:
            SampleError: one of them is unusable; none of them is acknowledged then.
            StateError: the journal cannot be written: nothing is taken.
        """
        planned: list[Record | SampleReport] = []
        taken: set[str] = set()
        for sample in samples:
            plan = self._skipped(sample) if sample.id in taken else self._plan(sample, refuse=refuse)
            planned.append(plan)
            if isinstance(plan, dict) and sample.id is not None:
                taken.add(sample.id)
        self._queue.acknowledge([plan for plan in planned if isinstance(plan, dict)])
        return planned

    def accept_rehearsal(self, updates: int | None, limit: int | None) -> bool:
        """See `StreamLearner.accept_rehearsal`."""
        count = len(self._state.unrehearsed()) if updates is None else updates
        count = count if limit is None else min(count, limit)
        if not count or not len(self._state.ring):
            return False
        self._queue.acknowledge([{"kind": "rehearse", "updates": count, "waiting_only": updates is None}])
        return True

    def accept_refresh(self) -> bool:
        """See `StreamLearner.accept_refresh`."""
        place = self._state.rounds.next(len(self._state.ring), self._state.store.served.version)
        if place is None:
            return False
        self._queue.acknowledge([{"kind": "refresh", "place": place}])
        return True

    def encode(self, sample: Sample) -> Encoded:
        """See `StreamLearner.encode`."""
        experts = self._state.store.names
        if sample.expert not in experts:
            raise SampleError(f"unknown expert {sample.expert!r}: known are {', '.join(experts)}; "
                              "add it, by `learn --add-expert` or by add_expert")
        if self.tokenizer is None and sample.prompt_ids is None:
            raise SampleError("the learner was made without a tokenizer: give prompt_ids and completion_ids")
        encoded = self._encode(sample, self.max_tokens)
        preflight, rows, tokens = self._preflight, encoded.completion_length, len(encoded.ids)
        fits = preflight.longest(tokens, rows)
        if not fits:
            needed = preflight.smallest(rows + 1, rows).peak_bytes
            refuse(f"the completion has {rows} tokens, which need {needed} bytes of activations, over the budget of "
                   f"{preflight.limit}",
                   f"set activation_budget_mib to {-(-needed // 2**20)} or more, or split the completion")
        return encoded if fits == tokens else self._encode(sample, fits)

    def _encode(self, sample: Sample, max_tokens: int) -> Encoded:
        return encode(sample, self.tokenizer, vocab_size=self.vocab_size, max_tokens=max_tokens,
                      append_eos=self._config.append_eos)

    def _record(self, sample: Sample, *, rehearsals: int, repeats: int) -> Record:
        if not sample.trained:
            return {"kind": "kept", "id": sample.id, "reason": "marked as wrong by its source",
                    "sample": sample.to_dict()}
        encoded = self.encode(sample)
        return {"kind": "sample", "id": sample.id, "digest": sample.digest, "ids": list(encoded.ids),
                "prompt_length": encoded.prompt_length,
                "expert": encoded.expert, "cut": encoded.cut, "asked": list(encoded.asked) if encoded.cut else None,
                "rehearsals": rehearsals, "repeats": repeats,
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
                return self._record(sample, rehearsals=self._config.rehearsals, repeats=self._config.repeats)
            except SampleError as error:
                if not refuse:
                    raise
                reason = str(error)
        if sample.id is not None and sample.id in self._state.refused:
            return self._rejected(sample, reason)
        return {"kind": "refused", "id": sample.id, "reason": reason}

    def _known(self, sample: Sample) -> SampleReport | None:
        """What to tell of a sample that there is nothing left to do for; None for any other."""
        if sample.id is None:
            return None
        if sample.id in self._state.seen:
            return self._skipped(sample)
        if sample.digest in self._state.refused:
            return self._rejected(sample, _REFUSED_BEFORE)
        return None

    def _waits(self, sample: Sample) -> bool:
        """Whether an aborted step, or a loop that has not come to it, has left a sample of this id pending."""
        return sample.id is not None and self._queue.holds(sample.id)

    def _skipped(self, sample: Sample | Refused) -> SampleReport:
        return SampleReport(sample.id, "skipped", self._state.store.served.version)

    def _rejected(self, sample: Sample | Refused, reason: str) -> SampleReport:
        return SampleReport(sample.id, "rejected", self._state.store.served.version, reason=reason)
