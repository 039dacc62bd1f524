"""Which models gain: rows of one small model, and the table of such rows."""

import json

import pytest

from benchmarks.cpu import bench_models
from benchmarks.report.cpu_tables import model_table
from mnv2_kernels.profiling import timing


@pytest.mark.skipif(timing._C is None, reason="needs the compiled extension")
@pytest.mark.parametrize(
    "name, fused, planned",
    [
        ("torchvision:mnasnet0_5", "17 of 17", True),
        ("timm:mobilenetv3_small_050", "11 of 11", True),
        ("timm:mobilenetv4_conv_small_035", "12 of 12", False),
    ],
)
def test_rows_and_table_of_a_model(name, fused, planned):
    rows = bench_models.measure_model(name, resolution=64, rounds=2)
    assert json.loads(json.dumps(rows)) == rows
    by_provider = {row["provider"]: row for row in rows}
    assert set(by_provider) == {"eager", "folded", "fused", *(["planned"] if planned else [])}
    for row in rows:
        assert (row["suite"], row["model"], row["resolution"]) == ("models", name, 64)
        assert (row["threads"], row["batch"]) == (1, 1) and row["gflops"] > 0
        assert (row["why_no_plan"] is None) == planned
    head, ruler, line = model_table(rows).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert head.count("|") == ruler.count("|") == line.count("|") == 8
    assert cells[:2] == [name, fused]
    speedup = by_provider["fused"]["speedup"]
    assert cells[2:4] == [f"{speedup['eager']:.2f}x", f"{speedup['folded']:.2f}x"]
    assert (cells[4] == "-") == (cells[6] == "-") == (not planned)
    peaks = [by_provider[name]["peak_bytes"] for name in ("fused", "eager")]
    assert cells[5] == f"{peaks[0] / peaks[1]:.0%}"


def test_models_in_the_table_are_those_that_were_measured_whole():
    def rows(model, over_folded):
        common = {"model": model, "blocks": 3, "blocks_fused": 2, "peak_bytes": 10}
        for provider in ("eager", "folded", "fused"):
            speedup = {"eager": 2.0, "folded": over_folded}
            yield {**common, "provider": provider, "speedup": speedup}

    some = [*rows("slow", 1.0), *rows("fast", 3.0), *list(rows("half", 2.0))[:2]]
    lines = model_table(some).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["fast", "slow"]
    assert model_table([]) == ""
