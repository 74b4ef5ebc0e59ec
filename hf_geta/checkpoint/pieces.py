"""Tensors that lie in pieces on several processes, as files: each process writes what it holds, any number reads it.

    model_piece_0_of_2.safetensors    rows 0 to 7 of a weight of 13, and what is whole
    model_piece_1_of_2.safetensors    rows 7 to 13

A file's header says under "pieces", as JSON, which part of a tensor it holds: {"NAME": {"dim": 0, "start": 7}}. What is
not named there is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hf_geta.sharding import cut_dim, is_first_copy, local, local_range, range_on

MODEL, OPTIMIZER = "model", "optimizer"


def piece_files(folder: Path, kind: str) -> list[str]:
    """The names of the files that one save of `kind` wrote, one for each of its processes; [] if there was none.

    Where some are not there, at least one of these is among the names.

    Raises:
        ValueError: if files of two saves are there.
    """
    found = [path.stem.rpartition("_")[2] for path in folder.glob(_file_name(kind, "*", "*"))]
    if len(counts := sorted(set(found))) > 1:
        raise ValueError(f"{folder} has files {kind}_piece_* of several saves, by {', '.join(counts)} processes.")
    processes = int(found[0]) if found and found[0].isdecimal() else len(found)
    return [_file_name(kind, process, processes) for process in range(min(processes, len(found) + 1))]


def _file_name(kind: str, process: int | str, processes: int | str) -> str:
    return f"{kind}_piece_{process}_of_{processes}.safetensors"


def write_pieces(folder: Path, kind: str, tensors: Mapping[str, Tensor], process: int, processes: int) -> None:
    """Write the parts of the tensors that this process holds, into a file of its own; every process calls it.

    Those of an earlier save by another number of processes are removed.
    """
    if process == 0:
        for path in folder.glob(_file_name(kind, "*", "*")):
            if not path.stem.endswith(f"_of_{processes}"):
                path.unlink()
    held, parts = {}, {}
    for name, tensor in tensors.items():
        dim = cut_dim(tensor)
        piece = local(tensor)
        if not is_first_copy(tensor) or (dim is not None and piece.shape[dim] == 0):
            continue
        held[name] = piece.to("cpu", copy=True).contiguous()
        if dim is not None:
            parts[name] = {"dim": dim, "start": local_range(tensor, dim).start}
    save_file(held, folder / _file_name(kind, process, processes), {"format": "pt", "pieces": json.dumps(parts)})


class Pieces:
    """The tensors that `write_pieces` left in a folder.

    Args:
        folder: where all of its files lie.
        kind: MODEL or OPTIMIZER.

    Attributes:
        dims: name -> the dimension along which the tensor was cut; None for one that is whole.
        shapes: name -> the shape of the whole tensor.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.dims: dict[str, int | None] = {}
        self.shapes: dict[str, list[int]] = {}
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}  # (start, stop, slice of a file)
        for name in piece_files(folder, kind):
            self._add_file(folder / name)

    def _add_file(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt").__enter__()
        parts = json.loads((file.metadata() or {}).get("pieces", "{}"))
        for name in file.keys():  # noqa: SIM118  (it is no dict)
            part = file.get_slice(name)
            shape = part.get_shape()
            dim = parts[name]["dim"] if name in parts else None
            start = parts[name]["start"] if name in parts else 0
            stop = start + (1 if dim is None else shape[dim])
            whole = self.shapes.setdefault(name, shape)
            if self.dims.setdefault(name, dim) != dim:
                raise ValueError(f"{path} holds {name} cut in another way than the files beside it.")
            if dim is not None:
                whole[dim] = max(whole[dim], stop)
            self._parts.setdefault(name, []).append((start, stop, part))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def whole(self, name: str) -> Tensor:
        """A tensor that was whole, on the CPU.

        Raises:
            ValueError: if it is not there, or was in pieces.
        """
        if self.dims.get(name, 0) is not None:
            raise ValueError(f"{self.folder} holds no whole {name}: it is of another model, or of another kind of run.")
        return self._parts[name][0][2][...]

    def rows(self, name: str, dim: int, rows: slice) -> Tensor:
        """The `rows` along `dim` of a tensor that was in pieces, from the files that hold them, on the CPU.

        Raises:
            ValueError: if it was not in pieces along `dim`, or some of the rows are in no file.
        """
        if self.dims.get(name) != dim:
            raise ValueError(f"{self.folder} holds no {name} in pieces: it is of another model or kind of run.")
        found, reached = [], rows.start
        for start, stop, part in sorted(self._parts[name], key=lambda part: part[:2]):
            if start <= reached < min(stop, rows.stop):
                window = slice(reached - start, min(stop, rows.stop) - start)
                found.append(part[(slice(None),) * dim + (window,)])
                reached = start + window.stop
        if reached != rows.stop:
            raise ValueError(f"{self.folder} has no rows {reached} to {rows.stop} of {name}: a file was exchanged.")
        return torch.cat(found, dim) if found else self._parts[name][0][2][(slice(None),) * dim + (slice(0, 0),)]

    def fill_(self, tensor: Tensor, name: str) -> None:
        """Overwrite what this process holds of a tensor that lies in pieces; ValueError where it is another one."""
        dim = cut_dim(tensor)
        assert dim is not None
        rows = self.rows(name, dim, local_range(tensor, dim))
        if self.shapes[name] != list(tensor.shape):
            raise ValueError(f"{self.folder} holds {name} as {self.shapes[name]}, the model {list(tensor.shape)}.")
        local(tensor).copy_(rows)

    def read(self, name: str, like: Tensor) -> Tensor:
        """A tensor as it was: whole, or in pieces on the processes that `like` lies on, and on its device."""
        dim = self.dims.get(name)
        if dim is None:
            return self.whole(name)
        if not isinstance(like, DTensor):
            raise ValueError(f"{self.folder} holds {name} in pieces, and this run has it whole: resume it under FSDP2.")
        shape = torch.Size(self.shapes[name])
        placements = [Shard(dim) if isinstance(placement, Shard) else placement for placement in like.placements]
        stride = torch.empty(shape, device="meta").stride()
        piece = self.rows(name, dim, range_on(like.device_mesh, placements, dim, shape[dim])).to(like.device)
        return DTensor.from_local(piece, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)
