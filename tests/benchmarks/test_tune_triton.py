"""Choosing configurations: what is tried, what is expected of it, what a table says."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.gpu import tune_triton
from benchmarks.gpu.tune_triton import Candidate, by_width, candidates
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


def test_a_width_gets_its_own_row_only_where_it_pays():
    square = configs.fallback(LATE_BLOCK, torch.float16).config
    row = replace(square, patch_h=1, patch_w=7)
    key = configs.key(LATE_BLOCK, torch.float16)

    def rows(square_time: float, row_time: float) -> dict:
        found = [candidate(square, square_time), candidate(row, row_time)]
        return {k: c.config for k, c in by_width(found, lambda c: c.microseconds)}

    assert rows(1.0, 2.0) == {key: square}
    assert rows(2.0, 1.0) == {key: square, f"{key}@7": row}


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
