"""The folder that results go to: what would make them unwritable is found before they are measured."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ogpstream.learner import OgpStreamError


class OutFolderError(OgpStreamError):
    """Results could not be written."""


def open_folder(out: Path, *files: str) -> None:
    """Make the folder, and in it the files that are to be written.

    Raises:
        OutFolderError: it cannot be written, or matplotlib is missing for the picture.
    """
    if find_spec("matplotlib") is None:
        raise OutFolderError("the picture needs matplotlib: pip install -c constraints.txt '.[bench]'")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            (out / file).touch()
    except OSError as error:
        raise OutFolderError(f"{out} cannot be written ({error.strerror}): choose another folder with --out") from None
