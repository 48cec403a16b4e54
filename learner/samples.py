"""Samples: a line of JSONL, checked, with nothing tokenised yet.

A line is a JSON object in TRL's forms: {"prompt", "completion"} as two texts or two lists of chat messages,
or {"messages"} (its last message, from the assistant, is the completion). Ids made elsewhere come as
{"prompt_ids", "completion_ids"}, two lists of integers that are taken as they are. Optional: "expert", "id",
"source" (texts; a number as id is taken as its digits), "label": false, which marks "that was wrong": kept,
not trained on, and "meta", an object of whatever a line should carry. Any other "label" and every other key is
metadata too, unless it looks like one of the optional keys misspelt: that refuses the line.
"""

import functools
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from os import PathLike
from typing import Any, BinaryIO, NoReturn

from ogpstream.learner.errors import ConfigError, SampleError
from ogpstream.memory.canonical import canonical_json

MAX_LINE = 16 * 2**20
# lines without an id whose repetitions are counted; the same number as the window of known ids
OCCURRENCE_WINDOW = 2**20

# names of files and of PEFT adapters are made of it
EXPERT_NAME = re.compile(r"\w[\w-]*")
# the expert that there is from the start; with routing by prompt a sample of it may go to another
DEFAULT_EXPERT = "default"

Message = dict[str, Any]

_TEXTS = ("expert", "id", "source")
# a misspelt one of these would go unnoticed; without one of the others there is no sample
_OPTIONAL = (*_TEXTS, "label")
_KEYS = ("prompt", "completion", "prompt_ids", "completion_ids", "messages", *_OPTIONAL, "meta")
_FORMS = 'give "prompt" and "completion", or "messages", or "prompt_ids" and "completion_ids"'


@dataclass(frozen=True)
class Sample:
    """One correction: what was asked, and what should have been answered.

    prompt and completion are both text or both lists of messages ({"role", "content"}, completion only from
    the assistant); both may be empty when prompt_ids and completion_ids are given, which are used instead of
    them. `label` False: kept, not trained on. `meta`: plain JSON of any keys, returned as it came. Raises
    SampleError.
    """

    prompt: str | list[Message] = ""
    completion: str | list[Message] = ""
    expert: str = DEFAULT_EXPERT
    id: str | None = None
    source: str | None = None
    label: bool | None = None
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[int, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.prompt_ids is None) != (self.completion_ids is None):
            refuse("only one of prompt_ids and completion_ids is there", "give both")
        if self.completion_ids is not None:
            for name in ("prompt_ids", "completion_ids"):
                object.__setattr__(self, name, _ids(getattr(self, name), name))
        if isinstance(self.prompt, str) and isinstance(self.completion, str):
            answer = self.completion
            if not (self.prompt.strip() if self.prompt_ids is None else self.prompt_ids):
                # it would be like every other one
                refuse("the prompt is empty", "give what was asked")
        elif isinstance(self.prompt, list) and isinstance(self.completion, list):
            _check_messages(self.prompt, "prompt")
            _check_messages(self.completion, "completion")
            if any(message["role"] != "assistant" for message in self.completion):
                refuse("the completion has a message that is not from the assistant", "move it to the prompt")
            answer = "".join(message["content"] for message in self.completion)
        else:
            kinds = f"{_kind(self.prompt)} and {_kind(self.completion)}"
            refuse(f"prompt and completion are {kinds}", "make both text or both lists of messages")
        if not (answer.strip() if self.completion_ids is None else self.completion_ids):
            refuse("the completion is empty", "give the text that should have been answered")
        for name in _TEXTS:
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (value is None and name != "expert"):
                refuse(f"{name} is {shown(value)}", "give a text that is not empty, or leave it out")
        if self.label is not None and type(self.label) is not bool:
            refuse(
                f"label is {shown(self.label)}",
                "only true and false have a meaning here; put other labels in meta",
            )
        if not isinstance(self.meta, dict):
            refuse(f"meta is {_kind(self.meta)}", "give a dict")
        try:
            canonical_json(self.to_dict())
        except ValueError as error:
            raise SampleError(one_line(str(error))) from None

    @property
    def trained(self) -> bool:
        """False for a sample that is kept without being learned."""
        return self.label is not False

    @property
    def digest(self) -> str:
        """Hash of all of it: what tells a mended sample from the one that was refused under the same id."""
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The sample as one JSON object; `from_dict` makes an equal one of it."""
        record: dict[str, Any] = {"prompt": self.prompt, "completion": self.completion, "expert": self.expert}
        if self.meta:
            record["meta"] = self.meta
        for name in ("id", "source", "label"):
            if getattr(self, name) is not None:
                record[name] = getattr(self, name)
        if self.prompt_ids is not None and self.completion_ids is not None:
            record |= {"prompt_ids": list(self.prompt_ids), "completion_ids": list(self.completion_ids)}
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Sample":
        """A sample of a JSON object in any of the forms of this module. Raises SampleError."""
        _check_keys(record)
        values = {key: record[key] for key in ("prompt", "completion") if record.get(key) is not None}
        if record.get("messages") is not None:
            if values:
                refuse(f'both "messages" and "{next(iter(values))}"', "leave one of them out")
            messages = record["messages"]
            _check_messages(messages, "messages")
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                refuse("messages do not end with an answer of the assistant to something", "put the answer last")
            values = {"prompt": list(messages[:-1]), "completion": [messages[-1]]}
        for key in ("prompt_ids", "completion_ids", *_TEXTS):
            if record.get(key) is not None:
                values[key] = record[key]
        if "completion_ids" not in values and len(values.keys() & {"prompt", "completion"}) < 2:
            missing = "completion" if "prompt" in values else "prompt"
            others = (key for key in record if key != missing)
            near = next((f", only {shown(key)}" for key in others if _resembled(key, (missing,))), "")
            refuse(f"no {missing}{near}", _FORMS)
        if type(values.get("id")) is int:
            values["id"] = str(values["id"])
        other = {key: value for key, value in record.items() if key not in _KEYS}
        if record.get("label") is False:
            values["label"] = False
        elif isinstance(record.get("label"), str) and record["label"].strip().lower() == "false":
            # what may have been meant as a mark must not be learned
            refuse(f"label is {shown(record['label'])}",
                   "write false without quotes for an answer that was wrong, or put the name of a class into meta")
        elif "label" in record:
            other["label"] = record["label"]
        meta = {} if record.get("meta") is None else record["meta"]
        if not isinstance(meta, dict):
            refuse(f"meta is {_kind(meta)}", "give an object")
        if twice := meta.keys() & other.keys():
            refuse(f"the key {shown(min(twice))} is there and in meta too", "leave one of them out")
        return cls(**values, meta={**other, **meta})


@dataclass(frozen=True)
class Refused:
    """A line of a stream that is no usable sample: its id (from the line's hash) and why, for the record."""

    id: str
    reason: str


def parse_line(line: str | bytes, *, file: str, number: int) -> Sample:
    """The sample of one line of JSONL. Raises SampleError "FILE:LINE: what is wrong; what to do"."""
    try:
        return Sample.from_dict(_load_object(line))
    except SampleError as error:
        raise SampleError(f"{file}:{number}: {error}") from None


def read_samples(path: str | PathLike[str]) -> Iterator[tuple[int, Sample | Refused]]:
    """(line number from 1, sample or why there is none) of each line of a JSONL file.

    The file is streamed, blank lines are passed over. A line without an id gets "<sha256 of the
    line>-<occurrence>": the line's bytes without its end, and how many equal lines without an id came up to
    here. Occurrences are counted over the last 2^20 different lines (at most about 150 MB): a line that
    repeats at a longer distance starts again at 1. A refused line always gets such an id, so that it is
    taken up again under its own once it is mended. Raises OSError.
    """
    counts = _Occurrences(OCCURRENCE_WINDOW)
    with open(path, "rb") as file:
        for number, line in _lines(file):
            if isinstance(line, int):
                limit = f"a line of {line} bytes, over the limit of {MAX_LINE}; split it or leave it out"
                yield number, Refused(f"line-{number}-of-{line}-bytes", f"{path}:{number}: {limit}")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                sample = parse_line(line, file=str(path), number=number)
            except SampleError as error:
                yield number, Refused(_line_id(line, counts), str(error))
                continue
            yield number, sample if sample.id is not None else replace(sample, id=_line_id(line, counts))


def _check_keys(record: Mapping[str, Any]) -> None:
    for key in record:
        if key not in _KEYS and (meant := _resembled(key, _OPTIONAL)):
            refuse(f"the key {shown(key)} is not known, the nearest is \"{meant}\"",
                   f'write that, or put it into "meta"; known are {", ".join(_KEYS)}')


@functools.lru_cache(maxsize=1024)
def _resembled(key: str, known: tuple[str, ...]) -> str | None:
    """Which of the known keys another one is taken for a misspelling of."""
    plain = "".join(filter(str.isalnum, key.casefold()))
    best = max(known, key=lambda name: SequenceMatcher(None, plain, name).ratio())
    # lable, labels, expret and sorce are; task, score, source_id and idx are not
    alike = SequenceMatcher(None, plain, best).ratio() >= 0.75 and abs(len(plain) - len(best)) <= 1
    return best if plain == best or alike and len(best) > 2 else None


def _load_object(line: str | bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        refuse(f"a line of more than {MAX_LINE} bytes", "split it or leave it out")
    try:
        # not json's own guess, which would also take UTF-16 and UTF-32
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except SampleError:
        raise
    except UnicodeDecodeError as error:
        refuse(f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8")
    except RecursionError:
        refuse("JSON nested too deeply", "flatten it")
    except ValueError as error:
        refuse(f"not JSON: {one_line(str(error))}", "write one JSON object per line")
    if not isinstance(value, dict):
        refuse(f"{_kind(value)} instead of a JSON object", _FORMS)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        refuse(f"the key {shown(twice)} is there twice", "leave one of them out")
    return value


def _no_constant(name: str) -> NoReturn:
    refuse(f"{name} is no JSON number", "use a finite number or null")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | int]]:
    """(number, line), or the length of a line over MAX_LINE, of which never more than that is held."""
    number = 0
    while line := file.readline(MAX_LINE + 2):
        number += 1
        if len(line.rstrip(b"\r\n")) > MAX_LINE:
            length = len(line)
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE)
                length += len(line)
            yield number, length
        else:
            yield number, line


def _line_id(line: bytes, counts: "_Occurrences") -> str:
    digest = hashlib.sha256(line)
    return f"{digest.hexdigest()}-{counts.add(digest.digest()[:8])}"


class _Occurrences:
    """How often a key was added, over the last `capacity` different keys, first in first out."""

    def __init__(self, capacity: int):
        self._counts: dict[bytes, int] = {}
        # beside the dict, since taking its first key again and again is quadratic
        self._order: deque[bytes] = deque()
        self._capacity = capacity

    def add(self, key: bytes) -> int:
        if key not in self._counts:
            if len(self._order) == self._capacity:
                del self._counts[self._order.popleft()]
            self._order.append(key)
        count = self._counts[key] = self._counts.get(key, 0) + 1
        return count


def _ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        refuse(f"{name} is {_kind(value)}", "give a list of integers")
    for token in value:
        if type(token) is not int:
            refuse(f"{name} has {shown(token)}", "give integers only")
    return tuple(value)


def _check_messages(messages: Any, name: str) -> None:
    if not isinstance(messages, list) or not messages:
        refuse(f"{name} is {_kind(messages) if messages else 'empty'}", "give a list of at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            refuse(f"{name} has a message without a role", 'give {"role": ..., "content": ...} with two texts')
        if not isinstance(message.get("content"), str):
            refuse(f"{name} has a {message['role']!r} message whose content is not text", "only text is learned")


def check_new_expert(name: str, rank: int | None, *, routes: bool, widest: int | None) -> None:
    """Whether there may be an expert of this name and rank.

    Args:
        routes: names that begin as those of routing are refused: a sample that waits may be about to make it.
        widest: the highest rank that the model allows; None where it is not known yet.

    Raises:
        ConfigError: there may not.
    """
    if not EXPERT_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of an expert: use letters, digits, '_' and '-'")
    if routes and name.startswith(f"{DEFAULT_EXPERT}-"):
        raise ConfigError(f"{name!r} is a name that routing gives: choose one that does not begin so")
    if rank is not None and widest is not None and not 1 <= rank <= widest:
        raise ConfigError(f"rank is {rank}: an expert of this model has a rank of 1 to {widest}")


def refuse(what: str, remedy: str) -> NoReturn:
    """Raise the SampleError "what; remedy"."""
    raise SampleError(f"{what}; {remedy}")


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def shown(value: Any) -> str:
    """A value of a sample for a message: ASCII, cut after 40 characters."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def one_line(text: str) -> str:
    """Another library's message for one of ours: one line, cut after 200 characters."""
    return " ".join(text.split())[:200]
