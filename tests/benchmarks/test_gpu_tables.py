"""Tables and the figure of the GPU suite come from its rows, and from no others."""

from benchmarks import harness
from benchmarks.report import gpu_tables, plot
from benchmarks.report.section import Section

FACTS = {"gpu": "NVIDIA X", "driver": "580", "cuda": "13.0", "torch": "2.11", "triton": "3.6.0"}
FACTS |= {"commit": "abc", "date": "2026-01-02T00:00:00+00:00"}
TIMES = {"fused": 1, "fused-triton": 2, "unfused": 3, "folded": 4, "eager": 8}


def row(suite: str, provider: str, batch: int, **more) -> harness.Row:
    """`fused` takes 10 us; the others as many times that as TIMES says."""
    times = TIMES[provider.removesuffix("-graph")]
    return {
        "suite": suite,
        "provider": provider,
        "batch": batch,
        "dtype": "float16",
        "seconds": {"50%": times * 1e-5},
        "images_per_second": batch / times / 1e-5,
        "share_of_floor": 0.5 / times,
        "speedup": {other: value / times for other, value in TIMES.items() if other != provider},
        "peak_bytes": times * 2**20,
        **FACTS,
        **more,
    }


def block_rows(batch: int) -> list[harness.Row]:
    return [
        row(
            "gpu_blocks",
            provider,
            batch,
            block=numbers[0],
            blocks=numbers,
            config=config.name,
            resolution=size,
            limit="bytes",
            backend="cuda",
            kernel="tile",
        )
        for (config, size), numbers in harness.distinct_blocks().items()
        for provider in TIMES
    ]


def section(folder, name: str) -> Section:
    return gpu_tables.gpu_sections(gpu_tables.latest_on_gpu(folder))[name]


def test_blocks(tmp_path):
    old = row("gpu_blocks", "fused", 256, block=1, blocks=[1], date="2025", gpu="NVIDIA Y")
    harness.append([old, *block_rows(256), *block_rows(1)], tmp_path)
    made = section(tmp_path, "gpu-blocks")
    assert "Measured on NVIDIA X, driver 580, CUDA 13.0" in str(made)
    blocks, means = made.table.split("\n\n")
    lines = blocks.splitlines()
    assert len(lines) == 2 + 12
    assert lines[2] == (
        "| 1 | 32x32x16-s1-k3 | 112x112 | tile | 10.0 | 50% | bytes"
        " | 2.00x | 3.00x | 4.00x | 8.00x | 1.0 | 4.0 |"
    )
    assert "| float16 | 256 | 170 | 50% | 2.00x | 3.00x | 4.00x | 8.00x |" in means
    assert "| float16 | 1 | 170 |" in means
    (path,) = plot.gpu_figures(gpu_tables.latest_on_gpu(tmp_path), tmp_path)
    assert "over unfused" in path.read_text()


def test_the_network(tmp_path):
    fused = row("gpu_network", "fused-graph", 256, model="net")
    fused["speedup"] = {"eager": 8.0, "folded": 4.0}
    eager = row("gpu_network", "eager", 256, model="net")
    failed = {k: v for k, v in eager.items() if k not in ("seconds", "images_per_second")}
    failed |= {"provider": "compiled", "error": "OutOfTime: not built within 150 s"}
    earlier = {**fused, "seconds": {"50%": 9.0}, "images_per_second": 1.0}
    harness.append([earlier, eager, failed, fused], tmp_path)
    lines = section(tmp_path, "gpu-network").table.splitlines()
    assert lines[-3:] == [
        "| 256 | fused-graph | 25600000 | 0.010 | 50% | - |",
        "| 256 | eager | 3200000 | 0.080 | 6% | 8.00x |",
        "| 256 | compiled | - | failed | - | - |",
    ]
