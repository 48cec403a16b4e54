"""The whole state of a learner as tensors and JSON: what a snapshot holds and what `state_sha256` covers.

Masters, held parts, moments, bases with their use, ring with priorities and flags, seen ids, counters and the
position in the journal. Random draws are keyed by (seed, counter), so the counters are all there is to restore.
Times and paths are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.errors import StateError
from ogpstream.learner.protection import Protection
from ogpstream.learner.rounds import Rounds
from ogpstream.learner.routes import Routes
from ogpstream.learner.samples import DEFAULT_EXPERT
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.canonical import canonical_hash
from ogpstream.memory.replay import ReplayRing, Slot
from ogpstream.memory.seen import SeenIds

if TYPE_CHECKING:
    # `status` reads a state without a model, and these two take seconds to import
    from transformers import PreTrainedModel

    from ogpstream.learner.sites import Attachment

FORMAT = 8
# ids a ring slot holds, prompt and completion together
SLOT_TOKENS = 1024
# latest samples that wait for their first rehearsal; with rehearsal by count there is one at a time
WAITING = 64


@dataclass
class Counters:
    """Everything that is counted and is part of the state.

    Attributes:
        acknowledged: records of samples taken in, of every fate.
        learned: new samples that an update was made for.
        rejected: refused by a guard, or unusable lines of a stream; each is counted once, however often it comes. And
            those of a frozen expert, each time.
        quarantined: kept for review, not trained on.
        updates: of all kinds, those included whose samples were all settled; they number the draws from the ring.
        gradients: gradient evaluations, one for each sample in each update.
        consolidations: calls of `consolidate` that rehearsed something.
    """

    acknowledged: int = 0
    learned: int = 0
    rejected: int = 0
    quarantined: int = 0
    updates: int = 0
    gradients: int = 0
    consolidations: int = 0


@dataclass
class Position:
    """How far the journal is applied: all of the records up to `seq`, and `done` updates of the one after it."""

    seq: int = 0
    done: int = 0


@dataclass
class LearnerState:
    """The parts of a learner that change.

    `waiting` holds the latest samples until their first rehearsal, whatever the ring keeps of them. `seen` holds the
    ids of samples that are done with, `refused` those of unusable lines and the digests of samples that a guard
    refused: they are not counted again, and once they are mended they are learned.
    """

    store: AdapterStore
    protection: Protection
    ring: ReplayRing
    waiting: ReplayRing
    seen: SeenIds
    refused: SeenIds
    counters: Counters
    position: Position
    rounds: Rounds = Rounds()  # noqa: RUF009 (it is frozen)
    routes: Routes = Routes(DEFAULT_EXPERT)  # noqa: RUF009

    @classmethod
    def fresh(cls, attachment: Attachment, config: LearnerConfig) -> LearnerState:
        """The empty state of a learner of this model: no expert, nothing protected."""
        model, shapes = attachment.model, attachment.shapes
        vocabulary = model.config.get_text_config().vocab_size
        return cls(
            AdapterStore(shapes, dtype=torch.float64 if model.dtype == torch.float64 else torch.float32,
                         serve_dtype=model.dtype, device=model.device, max_active=config.most_active,
                         apart=_apart(model, config),
                         # 16 columns are the least that tensor cores multiply
                         multiple=1 if model.device.type == "cpu" else 16),
            Protection(shapes, config),
            ReplayRing(config.ring_samples, SLOT_TOKENS, vocab_size=vocabulary, keep=config.ring_keep,
                       seed=config.seed),
            ReplayRing(WAITING, SLOT_TOKENS, vocab_size=vocabulary),
            SeenIds(),
            SeenIds(),
            Counters(),
            Position(),
        )

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values); the tensors may be those in use: write or copy them before the next update."""
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {
            "format": FORMAT, "counters": asdict(self.counters), "position": asdict(self.position),
            "rounds": asdict(self.rounds), "routes": self.routes.to_dict(),
        }
        for name, part in {"experts": self.store, **self._host_parts()}.items():
            own, meta[name] = part.state_dict()
            tensors.update({f"{name}.{key}": tensor for key, tensor in own.items()})
        for name, ids in self._windows().items():
            tensors.update({f"{name}.{key}": tensor for key, tensor in ids.state_dict().items()})
        return tensors, meta

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], version: int | None = None) -> None:
        """Take over a captured state.

        Memory may run out on the device; nothing has changed then.

        Args:
            version: number of the version that is served then; the captured one if None.

        Raises:
            StateError: it is of another format, or does not fit this model and configuration.
        """
        if meta.get("format") != FORMAT:
            raise StateError(f"the state has format {meta.get('format')}, this version reads {FORMAT}: "
                             "use the version that wrote it")
        try:
            # the one that needs memory of the device comes first
            self.store.load_state_dict(_under("experts", tensors), meta["experts"], version)
            for name, part in self._host_parts().items():
                part.load_state_dict(_under(name, tensors), meta[name])
            for name, ids in self._windows().items():
                ids.load_state_dict(_under(name, tensors))
            self.counters = Counters(**meta["counters"])
            self.position = Position(**meta["position"])
            self.rounds = Rounds(**meta["rounds"])
            self.routes = Routes.from_dict(meta["routes"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state does not fit this learner: {error}") from error

    def _host_parts(self) -> dict[str, Protection | ReplayRing]:
        return {"bases": self.protection, "ring": self.ring, "waiting": self.waiting}

    def _windows(self) -> dict[str, SeenIds]:
        return {"seen": self.seen, "refused": self.refused}

    def unrehearsed(self) -> list[Slot]:
        """Samples at hand that had no update after their first one, oldest first; none of an expert that rests."""
        slots = [ring.get(slot) for ring in (self.waiting, self.ring) for slot in ring.pending()]
        resting = self.resting
        found = {slot.uid: slot for slot in slots if slot.expert not in resting}
        return [found[uid] for uid in sorted(found)]

    @property
    def frozen(self) -> frozenset[str]:
        """The experts that learn nothing."""
        return frozenset(name for name in self.store.names if self.store.expert(name).frozen)

    @property
    def resting(self) -> frozenset[str]:
        """The experts whose old samples rest: the frozen ones, and those that are not served, since to rehearse one
        would serve it."""
        return self.frozen.union(set(self.store.names) - self.store.active.keys())

    def sha256(self) -> str:
        """Hash of all of it: equal states, and only these, have the same one."""
        return canonical_hash(*self.capture())


def _apart(model: PreTrainedModel, config: LearnerConfig) -> int | None:
    """Experts that are on the model's device at once, where one alone answers a prompt. Host RAM has room for all."""
    if not config.routes:
        return None
    return config.experts if model.device.type == "cpu" else config.max_active


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    mark = f"{name}."
    return {key.removeprefix(mark): tensor for key, tensor in tensors.items() if key.startswith(mark)}


def fingerprint(model: PreTrainedModel) -> str:
    """Hash that tells base models apart: architecture, shapes, and up to 1024 values of every parameter.

    Sampling keeps it under a second for models of gigabytes; two models that differ only elsewhere are not told apart.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items()
              if k not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 1024)][:1024].to("cpu", torch.float32)
        digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What bit-exact continuation depends on beside the state."""
    return {"torch": torch.__version__, "device": str(model.device.type), "threads": torch.get_num_threads()}
