"""On what it was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mandapa

PACKAGES = ("torch", "numpy", "zipnn")


def facts(disk: Path) -> dict[str, object]:
    """Cores, memory, file system, releases, and how busy the machine is already."""
    return {
        "cpu": value_of("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(value_of("/proc/meminfo", "MemTotal").split()[0]) / (1 << 20)),
        "file_system": file_system(disk),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "mandapa": mandapa.__version__,
        **{name: installed(name) for name in PACKAGES},
        "load_before": round(os.getloadavg()[0], 2),
    }


def installed(package: str) -> str:
    """Its release, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def value_of(file: str, name: str) -> str:
    """What a line of a file in /proc says."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "0")


def file_system(path: Path) -> str:
    """The kind of the one that a path is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(where, kind) for where, kind in mounts if path.resolve().is_relative_to(where)]
    return max(inside, key=lambda mount: len(mount[0]))[1]


def line(found: dict[str, object]) -> str:
    """All of it, for people."""
    return (
        f"{found['cores']} cores of {found['cpu']}, {found['memory_gib']} GiB, {found['file_system']}, "
        f"{found['system']}, Python {found['python']}, "
        + ", ".join(f"{name} {found[name]}" for name in PACKAGES)
        + f"; load before: {found['load_before']}"
    )
