"""Where a benchmark was measured: device, driver and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "transformers", "peft")


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions, as JSON lines and CSV files have them; None for what is not there."""
    import torch

    values: dict[str, Any] = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    if device.type == "cpu":
        return {**values, "device": f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads, {_processor()}",
                "capability": None, "driver": None}
    properties = torch.cuda.get_device_properties(device)
    return {**values, "device": properties.name, "capability": [properties.major, properties.minor],
            "driver": _driver()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
