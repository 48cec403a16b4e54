"""The parts of a learner, put together: of a new state, or of one that a folder holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ogpstream.learner import warmstart
from ogpstream.learner.config import LearnerConfig, ServedTo
from ogpstream.learner.description import Describer
from ogpstream.learner.errors import ConfigError, StateError
from ogpstream.learner.folder import StateFolder
from ogpstream.learner.gate import Gate
from ogpstream.learner.intake import Intake
from ogpstream.learner.queue import RecordQueue
from ogpstream.learner.roster import Roster
from ogpstream.learner.samples import DEFAULT_EXPERT
from ogpstream.learner.sites import attach
from ogpstream.learner.state import LearnerState, environment, fingerprint
from ogpstream.learner.update import Updater
from ogpstream.learner.versions import Versions
from ogpstream.memory.units import exhausted


class Assembly:
    """The parts in a sample's order: `intake`, `queue` with its applier, `updater`, `state`.

    Beside them `roster` and `versions`, which change the state by records too. `Assembly.new` and `Assembly.load` give
    one that can learn; this leaves the state empty.

    Args:
        model: its linears are adapted (`attachment`), it is frozen and put in eval mode.

    Raises:
        ConfigError, ModelError.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: LearnerConfig
    ) -> None:
        modules = config.target_modules
        self.attachment = attach(
            model,
            rank=config.rank,
            target_modules=list(modules) if isinstance(modules, tuple) else modules,
            basis_scope=config.basis_scope,
        )
        self.config = config
        try:
            self._put_together(model, tokenizer)
        except BaseException:
            self.attachment.detach()
            raise

    def _put_together(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        config = self.config
        self.state = LearnerState.fresh(self.attachment, config)
        describer = Describer(model.get_input_embeddings())
        # now, and not when the first prompt has come; prompts are remembered whoever is served, which may change
        describer.warm_up()
        if config.served_to == "scope":
            self.attachment.binding.gate = Gate(describer, batches=self.attachment.batches,
                                                nearest=config.routes)
        self.updater = Updater(self.attachment, self.state.store, self.state.protection, config, describer)
        own = {"config": config.to_dict(), "base": fingerprint(model), "environment": environment(model),
               "model": {"name": model.config.name_or_path, "dtype": str(model.dtype).removeprefix("torch.")}}
        self.queue = RecordQueue(self.state, self.updater, config, own)
        self.intake = Intake(tokenizer, self.queue)
        self.roster, self.versions = Roster(self.queue), Versions(self.queue)
        # not id 0: often the padding, whose embedding is zero and whose logits say nothing
        vocabulary = self.intake.vocab_size
        self.updater.walk.check(torch.tensor([[vocabulary // 3, vocabulary // 2]], device=model.device))
        # now, and not when the first sample has come: a server is waiting then
        _ = self.updater.preflight.footprint

    @classmethod
    def new(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: LearnerConfig,
        state_dir: str | os.PathLike[str] | None,
        calibration: Sequence[str] | None,
    ) -> Assembly:
        """With a state that has one expert and, in P, what the base model uses; saved as its first version."""
        parts = cls(model, tokenizer, config)
        applier = parts.queue.applier
        try:
            if state_dir is not None:
                applier.folder = folder = StateFolder(state_dir)
                if not folder.empty:
                    raise StateError(f"{state_dir} holds a state already: continue it with StreamLearner.load_state")
            if config.warm_start and config.guard == "fold":
                parts._warm_start(calibration)
            applier.operations.adopt(DEFAULT_EXPERT, config.rank, config.scaling)
            applier.operations.serve({DEFAULT_EXPERT: 1.0})
            parts.versions.save()
        except BaseException:
            parts.close()
            raise
        return parts

    @classmethod
    def load(
        cls,
        state_dir: str | os.PathLike[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        served_to: ServedTo | None = None,
    ) -> Assembly:
        """With the state of a folder: the newest valid snapshot, and the journal after it applied.

        Args:
            served_to: in place of what the state says, from now on.

        Raises:
            ConfigError: several experts, each for prompts of its own, cannot answer all prompts.
        """
        folder = StateFolder(state_dir)
        try:
            snapshot = folder.load()
            saved = LearnerConfig.from_dict(snapshot.meta["config"])
            config = saved if served_to is None else replace(saved, served_to=served_to)
            if config.routes != saved.routes:
                # what is in the journal was learned by the expert that was chosen then
                folder.close()
                cls._settle(state_dir, model, tokenizer, alone=saved.routes)
                folder = StateFolder(state_dir)
                snapshot = folder.load()
            parts = cls(model, tokenizer, config)
            parts.queue.applier.folder = folder
            try:
                parts.queue.applier.restore(snapshot.tensors, snapshot.meta)
                parts.queue.enqueue(folder.records(parts.state.position.seq))
                exhausted(parts.queue.drain())
                if config != saved:
                    # the journal behind it is one of this configuration
                    parts.versions.save()
            except BaseException:
                parts.attachment.detach()
                raise
        except BaseException:
            folder.close()
            raise
        return parts

    @classmethod
    def _settle(cls, state_dir: str | os.PathLike[str], model: PreTrainedModel,
                tokenizer: PreTrainedTokenizerBase | None, *, alone: bool) -> None:
        """Apply what the journal holds as it is served by now, and save it.

        Args:
            alone: an expert answers a prompt alone, and is not to any more.
        """
        parts = cls.load(state_dir, model, tokenizer)
        try:
            names = parts.state.store.names
            if alone and len(names) > 1:
                raise ConfigError(f"the experts {', '.join(names)} have learned prompts of their own each, and cannot "
                                  "all answer every prompt: leave served_to at 'scope', or learn with it at 'all'")
            parts.versions.save()
        finally:
            parts.close()

    def close(self) -> None:
        """Release the state folder and take the adapters out of the model.

        Raises:
            StateError: the folder cannot be written. It is released, and has all that was acknowledged.
        """
        self.queue.close()
        try:
            self.queue.applier.folder.close()
        finally:
            self.attachment.detach()

    def _warm_start(self, calibration: Sequence[str] | None) -> None:
        """Protect what the base model uses on calibration texts, or on samples of its own."""
        texts = warmstart.calibration_ids(self.attachment, self.intake.tokenizer, self.config, calibration,
                                          self.intake.max_tokens)
        self.state.protection.warm_start(warmstart.input_covariances(self.attachment, texts))
