"""Files of tensors in pieces: what N processes write, M read, whoever held which rows."""

import contextlib
import itertools
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_geta.checkpoint.optimizer_state import joined_state, split_state
from hf_geta.checkpoint.pieces import MODEL, OPTIMIZER, Pieces, piece_files, write_pieces
from hf_geta.sharding import local, range_on

WEIGHT = torch.arange(13 * 4, dtype=torch.float32).view(13, 4)
SHORT = torch.arange(3.0)  # leaves nothing to the last of four
STEP = torch.tensor(7.0)
MESHES = {1: (1,), 2: (2,), 3: (3,), 4: (4,), 6: (2, 3)}  # processes -> replicas, pieces


@contextlib.contextmanager
def process(rank, processes):
    """As one of several processes, which send nothing here."""
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        shape = MESHES[processes]
        yield init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    finally:
        dist.destroy_process_group()


def cut(tensor, mesh, dim=0):
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(dim)]
    rows = range_on(mesh, placements, dim, tensor.shape[dim])
    part = tensor.narrow(dim, rows.start, rows.stop - rows.start).clone()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def write(folder, processes, kind=MODEL):
    for rank in range(processes):
        with process(rank, processes) as mesh:
            tensors = {"weight": cut(WEIGHT, mesh), "columns": cut(WEIGHT, mesh, 1), "short": cut(SHORT, mesh)}
            write_pieces(folder, kind, {**tensors, "step": STEP}, rank, processes)


@pytest.mark.parametrize(("writers", "readers"), itertools.product(MESHES, MESHES))
def test_what_some_processes_write_any_number_reads(tmp_path, writers, readers):
    write(tmp_path, writers)
    for rank in range(readers):
        with process(rank, readers) as mesh:
            pieces = Pieces(tmp_path, MODEL)
            assert set(pieces) == {"weight", "columns", "short", "step"}
            assert pieces.whole("step") == STEP
            for name, tensor, dim in (("weight", WEIGHT, 0), ("columns", WEIGHT, 1), ("short", SHORT, 0)):
                expected = cut(tensor, mesh, dim)
                read = pieces.read(name, expected)
                assert (read.shape, read.placements) == (expected.shape, expected.placements)
                assert torch.equal(local(read), local(expected))
                filled = cut(torch.zeros_like(tensor), mesh, dim)
                pieces.fill_(filled, name)
                assert torch.equal(local(filled), local(expected))


def test_the_format_is_this(tmp_path):
    """Two files of 3 rows: what is whole is in the first alone."""
    for rank in range(2):
        with process(rank, 2) as mesh:
            write_pieces(tmp_path, MODEL, {"short": cut(SHORT, mesh), "step": STEP}, rank, 2)
    assert piece_files(tmp_path, MODEL) == ["model_piece_0_of_2.safetensors", "model_piece_1_of_2.safetensors"]
    headers, data = [], []
    for name in piece_files(tmp_path, MODEL):
        content = (tmp_path / name).read_bytes()
        size = int.from_bytes(content[:8], "little")
        headers.append(json.loads(content[8 : 8 + size]))
        data.append(content[8 + size :])
    assert headers[0]["__metadata__"] == {"format": "pt", "pieces": '{"short": {"dim": 0, "start": 0}}'}
    assert headers[1]["__metadata__"] == {"format": "pt", "pieces": '{"short": {"dim": 0, "start": 2}}'}
    assert headers[1]["short"] == {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert set(headers[0]) == {"__metadata__", "short", "step"}
    assert data[1] == bytes.fromhex("00000040")  # 2.0


def test_a_later_save_by_other_processes_is_the_one_that_is_read(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 3, OPTIMIZER)
    write(tmp_path, 2)
    assert piece_files(tmp_path, MODEL) == ["model_piece_0_of_2.safetensors", "model_piece_1_of_2.safetensors"]
    assert len(piece_files(tmp_path, OPTIMIZER)) == 3
    (tmp_path / "model_piece_1_of_2.safetensors").rename(tmp_path / "model_piece_1_of_3.safetensors")
    with pytest.raises(ValueError, match="of several saves"):
        piece_files(tmp_path, MODEL)


def test_a_name_with_a_huge_number_costs_nothing(tmp_path):
    (tmp_path / f"model_piece_0_of_{10**12}.safetensors").touch()
    assert not all((tmp_path / name).exists() for name in piece_files(tmp_path, MODEL))


def test_a_piece_of_another_save_is_not_taken_for_one_of_this(tmp_path):
    write(tmp_path, 2)
    first, second = (tmp_path / name for name in piece_files(tmp_path, MODEL))
    second.write_bytes(first.read_bytes())
    with process(1, 2) as mesh, pytest.raises(ValueError, match="has no rows 7 to 13 of weight"):
        Pieces(tmp_path, MODEL).fill_(cut(WEIGHT, mesh), "weight")


@pytest.mark.parametrize(
    ("name", "like", "told"),
    [("other", WEIGHT, "no other in pieces"), ("weight", WEIGHT[:12], r"\[13, 4\], the model \[12, 4\]")],
)
def test_a_model_with_other_tensors_is_refused(tmp_path, name, like, told):
    write(tmp_path, 2)
    with process(0, 2) as mesh, pytest.raises(ValueError, match=told):
        Pieces(tmp_path, MODEL).fill_(cut(like, mesh), name)


def test_the_state_of_an_optimizer_is_put_together_on_other_processes(tmp_path):
    def optimizer_of(mesh):
        whole = torch.nn.Parameter(torch.ones(2))
        cut_ones = [torch.nn.Parameter(cut(tensor, mesh)) for tensor in (WEIGHT, SHORT)]
        parameters = {"weight": cut_ones[0], "short": cut_ones[1], "whole": whole}
        groups = [{"params": cut_ones, "lr": 0.25}, {"params": [whole]}]
        return torch.optim.AdamW(groups, lr=0.5, foreach=False), parameters

    for rank in range(4):
        with process(rank, 4) as mesh:
            optimizer, parameters = optimizer_of(mesh)
            for parameter in parameters.values():
                parameter.grad = parameter.detach().clone()
            optimizer.step()
            tensors, rest = split_state(optimizer.state_dict(), parameters)
            write_pieces(tmp_path, OPTIMIZER, tensors, rank, 4)
    assert rest["state"] == {}
    with process(1, 2) as mesh:
        optimizer, parameters = optimizer_of(mesh)
        optimizer.load_state_dict(joined_state(rest, Pieces(tmp_path, OPTIMIZER), parameters))
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
        state = optimizer.state[parameters["weight"]]
        assert state["step"] == 1
        torch.testing.assert_close(local(state["exp_avg"]), 0.1 * WEIGHT[7:])
        torch.testing.assert_close(optimizer.state[parameters["whole"]]["exp_avg"], torch.full((2,), 0.1))
        del parameters["short"]
        with pytest.raises(ValueError, match="of short, which this run does not train"):
            joined_state(rest, Pieces(tmp_path, OPTIMIZER), parameters)
