"""What decides a run's figures beside its settings: code, versions and data; and the machine that it ran on."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_geta

SCRIPTS = Path(__file__).resolve().parents[1]


def identity(folders: Mapping[str, str]) -> dict[str, Any]:
    """Code, versions and data as plain values: what was measured with others is no result of this run.

    Args:
        folders: name -> local folder, of all that the run reads; empty where it reads from the Hub.
    """
    data = {name: folder_digest(folder) for name, folder in folders.items()}
    return {"code": code_digest(), "versions": versions(), "data": data}


def versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which torch.load refuses
        "transformers": transformers.__version__,
        "hf_geta": hf_geta.__version__,
    }


@functools.cache
def code_digest() -> str:
    """A hash of all `sources`, as they are when it is first asked for."""
    return _digest("".join(f"{file.name}\n{file.read_text(encoding='utf-8')}" for file in sources()))


def sources() -> list[Path]:
    """The library's files, and run.py with all that it imports of scripts/: what only renders a table is not there."""
    found: set[Path] = set()
    waiting = [Path(__file__).with_name("run.py")]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imported(file)
    return [*sorted(Path(hf_geta.__file__).parent.rglob("*.py")), *sorted(found)]


def _imported(file: Path) -> list[Path]:
    """The files of scripts/ that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = (SCRIPTS / f"{name.replace('.', '/')}.py" for name in names)
    return [found for found in files if found.exists()]


@functools.cache
def folder_digest(folder: str) -> str:
    """A hash of the names, sizes and times of a folder's files: a copy that was replaced is other data."""
    lines = []
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            stat = file.stat()
            lines.append(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}")
    return _digest("\n".join(lines))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hardware() -> str:
    """The processor of this machine, in words."""
    return f"{os.cpu_count()} cores of {_cpu_name()}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
