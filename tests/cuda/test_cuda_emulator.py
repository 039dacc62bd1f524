"""The block emulator (tests/cuda_on_cpu): what it must see, and what its instructions compute.

Every probe is a small kernel that is right, and with `broken` does one thing wrong. What is wrong
must be reported whatever the schedule, the seed and the side that a thread is on.
"""

import ctypes
from fractions import Fraction
from math import isfinite

import emulated_cuda
import numpy as np
import pytest
import torch
from emulated_cuda import A100, EMULATOR, ROOT, SCHEDULES, Emulator, EmulatorError

pytestmark = pytest.mark.skipif(
    emulated_cuda.why_not() is not None, reason=str(emulated_cuda.why_not())
)

# (probe, the numbers it is run with, what the message says)
RACES = [
    ("read_after_write", (0, 1), "race: "),
    ("write_after_read", (0, 1), "race: "),
    ("write_after_write", (0, 1), "race: write over what another thread wrote"),
    ("read_other_lane", (0,), "race: "),
    ("write_what_other_lane_reads", (0,), "race: "),
    ("warp_barrier_between_warps", (0,), "race: "),
    ("ldmatrix_is_no_barrier", (0,), "race: write over what another thread reads"),
    ("ldmatrix_after_write", (0,), "race: read of what another thread wrote"),
    ("copy_waited_for_by_its_thread_alone", (1, 32), "race: "),
    ("barrier_before_the_wait", (1, 32), "race: "),
    ("copy_over_what_others_read", (1, 32), "race: "),
    ("copy_not_waited_for", (0,), "race: an asynchronous copy to it was not waited for"),
    ("newest_group_not_waited_for", (0,), "race: an asynchronous copy"),
    ("empty_groups", (0,), "race: an asynchronous copy"),
    ("copy_without_a_group", (0,), "race: an asynchronous copy"),
    ("store_into_a_copy", (0,), "race: an asynchronous copy"),
    ("cluster_read", (0,), "race: .* block"),
    ("cluster_write_after_read", (0,), "race: "),
    ("cluster_block_ends", (0, 1), "the block ends while another may still read|has ended"),
]
UNWRITTEN = [
    ("read_of_nothing", (0,), "nobody has written this"),
    ("matrix_of_nothing", (0,), "ldmatrix.x4 at 16 of shared memory: nobody has written this"),
    ("read_what_the_last_block_wrote", (0, 1), "nobody has written this"),
]
# These show without tracking too.
OTHERS = [
    ("barrier_left_out_by_one", (0, 40, 63), "stuck|after 1 threads have ended"),
    ("warp_barrier_left_out_by_one", (0, 40, 63), "stuck: thread .* waits at the warp barrier"),
    ("lanes_at_different_collectives", (0, 31), "diverged: this lane is at .*, others of its warp"),
    ("lanes_at_different_barriers", (0, 31), "stuck"),
    ("store_past_the_end", (0,), "thread 31: store of 2 bytes at 512 of 512 bytes"),
    ("load_before_the_start", (0,), "thread 0: load of 4 bytes at -4 of 512 bytes"),
    ("matrix_past_the_end", (0,), "ldmatrix.x4 of 16 bytes at 512 of 512 bytes"),
    ("misaligned", (0,), "load of 4 bytes at .*, which is no multiple"),
    ("misaligned_matrix", (0,), "ldmatrix.x2 of 16 bytes at .*, which is no multiple"),
    ("copy_from_misaligned", (0,), "from an address that is no multiple of 16"),
    ("write_to_nowhere", (0,), "access to address 0x40"),
    ("division_by_zero", (0,), "division by 0"),
    ("ends_with_a_copy", (0,), "ends with 1 asynchronous copies not waited for"),
    ("cluster_barrier_left_out", (0, 1), "stuck|after threads have ended"),
]
EVERY_SCHEDULE = [(schedule, seed) for schedule in SCHEDULES for seed in range(5)]


@pytest.fixture(scope="module")
def emulator():
    return Emulator(emulated_cuda.build([ROOT / "tests/cuda_on_cpu/probes.cu", *EMULATOR]))


def probe(
    emulator: Emulator,
    name: str,
    inputs: np.ndarray | None = None,
    outputs: int = 256,
    number: int = 0,
    broken: bool = False,
    **options,
) -> np.ndarray:
    """Runs a probe on inputs of any type; what it wrote, as uint32."""
    words = np.frombuffer((b"" if inputs is None else inputs.tobytes()).ljust(16), np.uint32)
    room = np.zeros(len(words) + 8, np.uint32)
    aligned = room[-(room.ctypes.data // 4) % 4 :][: len(words)]
    aligned[:] = words
    out = np.zeros(outputs, np.uint32)

    def pointer(array):
        return ctypes.c_void_p(array.ctypes.data)

    def start() -> int:
        arguments = name.encode(), broken, number, pointer(aligned), pointer(out)
        return emulator.functions.mnv2_probe(*arguments)

    emulator.launch(name, start, **options)
    return out


@pytest.mark.parametrize("name, numbers, message", RACES + UNWRITTEN + OTHERS)
def test_what_is_wrong_is_seen_in_every_schedule(emulator, name, numbers, message):
    for number in numbers:
        for schedule, seed in EVERY_SCHEDULE:
            how = {"number": number, "schedule": schedule, "seed": seed}
            probe(emulator, name, **how)
            with pytest.raises(EmulatorError, match=message):
                probe(emulator, name, broken=True, **how)


@pytest.mark.parametrize("name", ["read_after_write", "read_of_nothing", "copy_not_waited_for"])
def test_without_tracking_they_run_on(emulator, name):
    probe(emulator, name, broken=True, tracking=False)


def test_a_launch_after_one_that_failed(emulator):
    with pytest.raises(EmulatorError):
        probe(emulator, "read_after_write", broken=True)
    out = probe(emulator, "read_after_write")
    assert out[32:64].tolist() == list(range(100, 132))


def test_values_cross_a_cluster(emulator):
    out = probe(emulator, "cluster_read").reshape(4, 64)
    assert (out == np.array([[1], [0], [3], [2]])).all()
    with pytest.raises(EmulatorError, match="clusters of 2 blocks, of which the GPU can place 1"):
        probe(emulator, "cluster_read", device=A100)


def test_blocks_and_barriers_are_counted(emulator):
    probe(emulator, "read_what_the_last_block_wrote")
    assert emulator.counts.blocks == 2 and emulator.counts.block_barriers == 0
    probe(emulator, "write_after_read")
    assert emulator.counts.blocks == 1 and emulator.counts.block_barriers == 2


@pytest.mark.parametrize(
    "pitch, passes", [(0, 1), (16, 1), (32, 2), (48, 1), (64, 4), (112, 1), (128, 8), (144, 1)]
)
def test_passes_over_the_banks(emulator, pitch, passes):
    """Eight rows of 16 bytes, 128 bytes a pass; both matrices of x2 have the first lanes' rows."""
    probe(emulator, "passes", number=pitch)
    assert emulator.counts.matrices == 2 and emulator.counts.passes == 2 * passes


# ---- Fragments, as in the PTX manual


@pytest.mark.parametrize("count, transposed", [(4, 0), (2, 0), (4, 1), (2, 1), (1, 1)])
def test_ldmatrix(emulator, count, transposed):
    elements = np.arange(1, 257, dtype=np.uint16).reshape(4, 8, 8)
    name = f"x{count}" + " transposed" * transposed
    out = probe(emulator, name, elements, count * 32).view(np.uint16).reshape(count, 8, 4, 2)
    for m in range(count):
        matrix = elements[m].T if transposed else elements[m]
        assert (out[m].reshape(8, 8) == matrix).all()


def random_elements(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def bits(tensor: torch.Tensor) -> np.ndarray:
    kinds = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
    integer, unsigned = kinds[tensor.element_size()]
    return tensor.contiguous().view(integer).numpy().view(unsigned)


@pytest.mark.parametrize("k", (8, 16))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_matrix_product(emulator, dtype, k):
    a, b = random_elements(dtype, 16, k), random_elements(dtype, k, 8) * 3
    sums = torch.randn(16, 8)
    lanes = np.arange(32)
    g, t = lanes // 4, lanes % 4
    a_bits, b_bits, sums_array = bits(a), bits(b), sums.numpy()
    words = np.zeros((k // 4 + k // 8, 32, 2), np.uint16)
    for half in range(2):
        for part in range(k // 8):
            for below in range(2):
                column = 2 * t + half + 8 * part
                words[2 * part + below, :, half] = a_bits[g + 8 * below, column]
            words[k // 4 + part, :, half] = b_bits[2 * t + half + 8 * part, g]
    rows, columns = np.stack([g, g, g + 8, g + 8], 1), np.stack([2 * t, 2 * t + 1] * 2, 1)
    inputs = np.concatenate(
        [words.view(np.uint8).ravel(), sums_array[rows, columns].view(np.uint8).ravel()]
    )
    name = f"{'half' if dtype == torch.float16 else 'bfloat16'} k{k}"
    out = probe(emulator, name, inputs, 128).view(np.float32).reshape(32, 4)
    exact = sums.double() + a.double() @ b.double()
    magnitude = sums.double().abs() + a.double().abs() @ b.double().abs()
    error = np.abs(out - exact.numpy()[rows, columns])
    assert (error <= (k + 1) * 2.0**-24 * magnitude.numpy()[rows, columns]).all()
    assert np.abs(out).max() > 1


# ---- Arithmetic: rounded once, and NaN is kept


def as_floats(dtype: torch.dtype, pairs: np.ndarray) -> np.ndarray:
    return torch.from_numpy(pairs.view(np.int16).copy()).view(dtype).double().numpy()


def rounded_once(value: Fraction, dtype: torch.dtype) -> float:
    """To nearest, ties to even, by whole numbers alone."""
    digits, smallest = (11, -24) if dtype == torch.float16 else (8, -133)
    if value == 0:
        return 0.0
    exponent = smallest
    while abs(value) >= Fraction(2) ** (exponent + digits):
        exponent += 1
    scaled = value / Fraction(2) ** exponent
    number = Fraction(round(scaled)) * Fraction(2) ** exponent
    if abs(number) > Fraction(torch.finfo(dtype).max):
        return float("inf") if number > 0 else float("-inf")
    return float(number)


def interesting(dtype: torch.dtype) -> np.ndarray:
    """Bits of triples (a, b, c): any, sums that cancel, and products that are ties but for c."""
    random = np.random.default_rng(0)
    triples = random.integers(0, 1 << 16, (2000, 3)).astype(np.uint16)
    one, step = (0x3C00, 1) if dtype == torch.float16 else (0x3F80, 1)
    for i in range(0, 600, 3):
        low = int(random.integers(0, 64))
        triples[i] = one + step * low, one + int(random.integers(0, 64)), random.integers(1, 4)
        triples[i + 1] = triples[i] | np.array([0x8000, 0, 0x8000], np.uint16)
        triples[i + 2] = triples[i]
        triples[i + 2, 2] ^= 0x8000
    # 1.5 times 1 + 2 ** -(digits - 1) is a tie.
    triples[600:603] = [
        [one | (0x200 if one == 0x3C00 else 0x40), one + 1, c] for c in (0, 1, 0x8001)
    ]
    return triples


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_arithmetic_of_pairs(emulator, dtype):
    triples = interesting(dtype)
    values = as_floats(dtype, triples)
    keep = np.isfinite(values).all(1)
    triples, values = triples[keep], values[keep]
    count = len(triples) // 2
    triples, values = triples[: 2 * count], values[: 2 * count]
    # Two triples a pair: one in the lower halves, one in the upper.
    inputs = np.ascontiguousarray(triples.reshape(count, 2, 3).transpose(0, 2, 1))
    name = "half arithmetic" if dtype == torch.float16 else "bfloat16 arithmetic"
    out = probe(emulator, name, inputs, 4 * count, number=count)
    out = (
        as_floats(dtype, out.view(np.uint16)).reshape(count, 4, 2).transpose(0, 2, 1).reshape(-1, 4)
    )
    seen = 0
    for (a, b, c), (fused, fused_relu, least, most) in zip(values, out, strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        expected = rounded_once(exact, dtype)
        assert fused == expected and fused_relu == max(expected, 0)
        assert least == min(a, b) and most == max(a, b)
        product = rounded_once(Fraction(a) * Fraction(b), dtype)
        twice = (
            rounded_once(Fraction(product) + Fraction(c), dtype) if isfinite(product) else product
        )
        seen += twice != expected
    assert seen >= 10, "too few triples show a second rounding"


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_nan_is_kept(emulator, dtype):
    name = "half" if dtype == torch.float16 else "bfloat16"
    nan, two, one = (int(bits(torch.tensor([v], dtype=dtype))[0]) for v in (float("nan"), 2, 1))
    pairs = [(nan | two << 16, two | nan << 16, one | one << 16)]
    out = probe(emulator, f"{name} arithmetic", np.array(pairs, np.uint32), 4, number=1)
    assert (out == 0x7FFF7FFF).all()
    floats = np.array([[np.nan, -1.0], [1.0, np.nan], [-0.0, 0.0]], np.float32)
    out = probe(emulator, f"{name} rounding", floats, 18, number=3).reshape(3, 6)
    assert out[0, 1] == 0x00007FFF and out[1, 1] >> 16 == 0x7FFF
    assert np.isnan(out[:2, 2:4].copy().view(np.float32)).all()
    assert out[2, 2] == 0x80000000 and out[2, 3] == 0


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_rounding_of_floats(emulator, dtype):
    generator = torch.Generator().manual_seed(2)
    near = torch.randn(500, generator=generator).to(dtype).float()
    steps = torch.randn(500, generator=generator) * torch.finfo(dtype).eps
    ties = near * (1 + torch.finfo(dtype).eps / 2)
    tiny = torch.randn(500, generator=generator) * torch.finfo(dtype).smallest_normal
    values = torch.cat([near + steps, ties, tiny, torch.tensor([1e38, -7e4, 65519.9, 65520.0])])
    name = "half rounding" if dtype == torch.float16 else "bfloat16 rounding"
    count = len(values) // 2
    out = probe(emulator, name, values.numpy(), 6 * count, number=count).reshape(count, 6)
    expected = values.to(dtype)
    assert (out[:, 0].copy().view(np.uint16) == bits(expected)).all()
    assert (
        as_floats(dtype, out[:, 1].copy().view(np.uint16)) == expected.clamp(min=0).double().numpy()
    ).all()
    pairs = values.view(-1, 2)
    floats = out[:, 2:].copy().view(np.float32)
    assert (floats[:, 0] == pairs.amin(1).numpy()).all()
    assert (floats[:, 1] == pairs.amax(1).numpy()).all()
    assert (floats[:, 2:] == expected.float().view(-1, 2).numpy()).all()


@pytest.mark.parametrize("length", range(17))
def test_a_copy_fills_up_with_zeros(emulator, length):
    data = np.arange(1, 17, dtype=np.uint8)
    out = probe(emulator, "copy with zeros", data, 4, number=length).view(np.uint8)
    assert out.tolist() == [*range(1, length + 1), *[0] * (16 - length)]
