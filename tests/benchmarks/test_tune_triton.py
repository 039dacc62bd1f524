"""Choosing configurations: what is tried, what is expected of it, what a table says."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from math import nan

import pytest
import torch

from benchmarks.gpu import tune_triton
from benchmarks.gpu.tune_triton import Candidate, by_width, candidates, estimate
from benchmarks.harness import BLOCKS, distinct_blocks
from benchmarks.machine_code.triton_code import ARITHMETIC, Code, arithmetic
from mnv2_kernels.ops.triton import configs

BLOCK, SIZE = BLOCKS[2]
LATE_BLOCK, LATE_SIZE = BLOCKS[14]


def code(*, registers: int = 128, instructions: int = 100) -> Code:
    return Code(registers, 0, 1024, Counter(HFMA2=instructions), 1.0, 100)


def candidate(config, microseconds: float) -> Candidate:
    return Candidate(LATE_BLOCK, LATE_SIZE, "float16", config, code(), microseconds)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_candidates_fit_a_gpu(name):
    with arithmetic(name) as dtype:
        for block, size in distinct_blocks():
            found = list(candidates(block, size, dtype))
            assert len(set(found)) == len(found)
            for config in found:
                assert configs.shared_bytes(block, config, dtype) <= configs.SHARED_BYTES
                assert block.hidden_channels % config.chunk == 0
                assert config.out_tile * config.out_tiles >= block.out_channels
                assert config.half == (dtype == torch.float16 and block.expansion)
        assert list(candidates(BLOCK, SIZE, dtype))


def test_more_instructions_and_fewer_warps_are_expected_to_be_slower():
    config = next(candidates(BLOCK, SIZE, torch.float16))
    base = estimate(BLOCK, SIZE, config, code())
    assert estimate(BLOCK, SIZE, config, code(instructions=200)) > 1.5 * base
    assert estimate(BLOCK, SIZE, config, code(registers=255)) > base
    # 28 columns are 14 patches of 2, but 8 of 4 that cover 32.
    assert SIZE == 56
    wide = replace(config, patch_w=4)
    assert estimate(BLOCK, 28, wide, code()) == pytest.approx(
        estimate(BLOCK, 28, config, code()) * (7 / 14)
    )


def test_a_width_gets_its_own_row_only_where_it_pays():
    square = configs.fallback(LATE_BLOCK, torch.float16).config
    row = replace(square, patch_h=1, patch_w=7)
    key = configs.key(LATE_BLOCK, torch.float16)

    def rows(square_time: float, row_time: float) -> dict:
        found = [candidate(square, square_time), candidate(row, row_time)]
        return {k: c.config for k, c in by_width(found, lambda c: c.microseconds)}

    assert rows(1.0, 2.0) == {key: square}
    assert rows(2.0, 1.0) == {key: square, f"{key}@7": row}


def test_what_spills_anywhere_is_no_candidate(monkeypatch):
    spilling = {80: 65, 90: 0}
    monkeypatch.setattr(
        tune_triton,
        "compile_block",
        lambda *args: replace(code(), spill_bytes=spilling[args[-1]]),
    )
    work = (LATE_BLOCK, LATE_SIZE, "float16", configs.fallback(LATE_BLOCK, torch.float16).config)
    assert tune_triton.compiled(work) is None
    spilling[80] = 64
    assert tune_triton.compiled(work).config == work[-1]


def test_a_gpu_is_tuned_until_time_is_over(tmp_path, monkeypatch):
    """All but the GPU itself: what is measured, what is left out, what is written when."""
    monkeypatch.setattr(configs, "gpu_name", lambda device: "A_GPU")
    monkeypatch.setattr(tune_triton, "processes", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr(tune_triton, "compile_block", lambda *args: code())
    monkeypatch.setattr(tune_triton, "prepared", lambda candidate: None)
    monkeypatch.setattr(tune_triton, "workload", lambda *args, **kwargs: (None, None))
    monkeypatch.setattr(tune_triton, "on_gpu", lambda candidate, *tensors: candidate)
    monkeypatch.setattr(
        tune_triton, "largest_error", lambda c, dtype: nan if c.config.patch_h == 2 else 1.0
    )
    monkeypatch.setattr(
        tune_triton, "do_bench_cudagraph", lambda run, **kwargs: 1.0 / run.config.num_stages
    )
    path = tune_triton.tune(tmp_path, minutes=0, workers=1, tried=20)
    rows = json.loads(path.read_text())["configs"]
    block, _ = BLOCKS[0]
    assert list(rows) == [configs.key(block, torch.float16)]
    (config,) = rows.values()
    assert config["num_stages"] == 2 and config["patch_h"] == 1


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    config = configs.fallback(LATE_BLOCK, torch.float16).config
    row = replace(config, patch_h=1, patch_w=7)
    key = configs.key(LATE_BLOCK, torch.float16)
    path = tmp_path / "sm_90.json"
    tune_triton.write(path, "for a test", {key: asdict(config), f"{key}@7": asdict(row)})
    assert json.loads(path.read_text())["how"] == "for a test"
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    configs.load.cache_clear()
    try:
        cpu = torch.device("cpu")
        assert configs.choose(LATE_BLOCK, torch.float16, cpu) == configs.Choice(
            config, "table sm_90"
        )
        assert configs.choose(LATE_BLOCK, torch.float16, cpu, 7).config == row
        assert configs.choose(LATE_BLOCK, torch.float16, cpu, 8).config == config
        assert configs.choose(LATE_BLOCK, torch.bfloat16, cpu).source.startswith("rules")
    finally:
        configs.load.cache_clear()
