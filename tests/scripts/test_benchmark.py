"""Laws of the program that measures, and of its short topics."""

from pathlib import Path

import benchmark
import benchmark_alignment
import benchmark_kernels
import pytest
import torch

from hf_geta.checkpoint.integer import has_integer_kernel

SCRIPTS = Path(benchmark.__file__).parent


def test_one_program_measures_every_topic(capsys):
    assert set(benchmark.TOPICS) == {path.stem.removeprefix("benchmark_") for path in SCRIPTS.glob("benchmark_*.py")}
    figures = benchmark.main(["alignment", "--sizes", "9", "16", "--rounds", "1", "--rows", "2"])
    assert set(figures) == set(benchmark_alignment.KINDS)
    capsys.readouterr()
    benchmark.main([])
    told = capsys.readouterr().out
    assert all(f"benchmark.py {topic} " in told for topic in benchmark.TOPICS)
    with pytest.raises(SystemExit, match="there is no topic infrence; write one of training, inference"):
        benchmark.main(["infrence"])


def test_a_size_is_compared_by_its_units(capsys):
    figures = benchmark_alignment.main(["--sizes", "9", "16", "--rounds", "1", "--rows", "2"])
    assert all(by_size[16] == 1 and by_size[9] > 0 for by_size in figures.values())
    assert "| hidden units | 9 | 16 |" in capsys.readouterr().out


def test_kernels_that_are_compared_make_the_same_product(capsys):
    figures = benchmark_kernels.main(["--outputs", "64", "--inputs", "96", "--rows", "3", "--rounds", "1"])[3]
    errors = {name: error for name, (_, error) in figures.items()}
    assert len(errors) == 6
    if not has_integer_kernel(torch.int8):  # without VNNI it may saturate
        errors.pop(benchmark_kernels.INT8)
    for name, error in errors.items():
        assert error < 1e-2 if name.endswith("bfloat16") else error == 0, name
    assert "| rows | 3 | largest error |" in capsys.readouterr().out
