"""The test matrix: what is checked, how many cases are asked for, and which tests count for it.

`make test-report` counts by these rows, docs/testing.md lists them. A row's tests are written as
`file`, `file::function`, or the beginning of a test's name with a `*` behind it. A test may count
for several rows; one that counts for none is listed by the report all the same.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One kind of check.

    asked: cases of an ordinary run without a GPU; long: of a long run, where that asks for more;
    gpu: of `benchmarks.gpu.suite` on a GPU.
    """

    id: str
    what: str
    asked: int
    tests: tuple[str, ...]
    long: int = 0
    gpu: int = 0

    def asked_of(self, run: str) -> int:
        """run: short, long or gpu."""
        return {"short": self.asked, "long": max(self.asked, self.long), "gpu": self.gpu}[run]


# Of these a run without a GPU must have seen at least one call.
BACKENDS = ("cpu", "triton")
# Not a file of tests: what compute-sanitizer watches.
ON_DEVICE = "sanitizer"

ROWS = (
    Row(
        "T1",
        "C++ kernels against float64: every shape in NCHW and NHWC, float32 and both 16-bit types",
        940,
        (
            "test_inverted_residual.py::test_values[cpu*",
            "test_inverted_residual.py::test_large_images",
            "test_inverted_residual.py::test_biases_may_have_the_dtype_of_x",
            "test_inverted_residual.py::test_padding_left_out_keeps_the_size",
            "test_elements.py",
            "test_neon.py",
        ),
    ),
    Row(
        "T2",
        "recognised modules of torchvision, timm, transformers and others against their own code",
        120,
        (
            "test_recognizers.py",
            "test_fuse.py::test_network_answers_the_same",
            "test_models.py",
            "test_same_padding.py::test_padding_is_tensorflows",
        ),
    ),
    Row("T3", "Triton's interpreter against float64, three dtypes", 180, ("test_triton.py",)),
    Row(
        "T4",
        "CUDA and Triton on a GPU, every shape, dtype and layout; here the CUDA kernels on the"
        " emulator",
        1000,
        (
            "test_cuda_gpu.py::test_values",
            "test_triton_gpu.py::test_values",
            "test_cuda_kernels.py::test_every_block_that_it_takes",
            "test_cuda_emulator.py",
            "test_cuda_op.py::test_values",
        ),
        gpu=4200,
    ),
    Row(
        "T5",
        "random calls of the op: shapes, strides, offsets, dtypes, clips",
        2150,
        ("test_fuzz.py", "test_triton_fuzz.py", "test_cuda_gpu.py::test_random_calls"),
        long=20000,
        gpu=1000,
    ),
    Row(
        "T5-fuse",
        "random networks through `fuse`, and what must be declined",
        250,
        ("test_fuzz_fuse.py",),
        long=10000,
    ),
    Row(
        "T5-plan",
        "random chains through `plan`",
        300,
        ("test_plan.py::test_random_chains", "test_fuzz_plan.py"),
        long=3000,
    ),
    Row(
        "T6",
        "any layout of x and the weights: orders, slices, overlaps, offsets, odd strides",
        110,
        (
            "test_layouts.py",
            "test_triton_memory.py::test_any_layout_of_x",
            "test_triton_memory.py::test_any_layout_of_the_weights",
            "test_plan.py::test_any_layout_of_x",
            "test_cuda_op.py::test_a_view_may_begin_anywhere",
            "test_cuda_gpu.py::test_a_view_may_begin_anywhere",
        ),
        gpu=90,
    ),
    Row(
        "T7",
        "strides of the result are those of the fake kernel",
        90,
        (
            "test_layouts.py::test_any_layout_of_x",
            "test_layouts.py::test_any_layout_of_the_weights",
            "test_layouts.py::test_sizes_of_one_with_odd_strides",
            "test_triton_op.py::test_the_result_is_what_the_fake_kernel_says",
        ),
    ),
    Row(
        "T8",
        "opcheck, all four utilities on 40 samples of the forward and 40 of the backward op",
        320,
        (
            "test_ops.py::test_opcheck",
            "test_ops.py::test_opcheck_of_backward",
            "test_triton_op.py::test_opcheck",
            "test_triton_op.py::test_opcheck_in_half_precision",
            "test_compile.py::test_opcheck_of_the_layers_op",
            "test_plan_op.py::test_opcheck",
            "test_plan_arena.py::test_opcheck",
            "test_cuda_gpu.py::test_opcheck",
        ),
        gpu=40,
    ),
    Row(
        "T9",
        "gradients: finite differences, layouts of the incoming gradient, every subset, pieces",
        110,
        (
            "test_gradients.py",
            "test_backward.py",
            "test_fused_autograd.py",
            "test_cuda_gpu.py::test_gradients_are_those_of_the_reference",
            "test_triton_op.py::test_gradients_are_those_of_the_reference",
        ),
        gpu=40,
    ),
    Row(
        "T10",
        "NaN, infinities, signed zeros and denormals at every kind of position and tensor",
        140,
        (
            "test_numerics.py::test_special_values_at_every_position_of_x",
            "test_numerics.py::test_special_values_in_the_weights",
            "test_numerics.py::test_weights_over_padding_do_not_count",
            "test_numerics.py::test_denormals_are_not_flushed",
            "test_triton_numerics.py::test_special_values_at_every_position_of_x",
            "test_triton_numerics.py::test_special_values_in_taps",
            "test_triton_numerics.py::test_special_values_in_the_weights",
            "test_triton_numerics.py::test_denormals_are_not_flushed",
            "test_cuda_kernels.py::test_special_values_in_x",
            "test_cuda_kernels.py::test_special_values_in_weights",
            "test_cuda_kernels.py::test_denormals_are_not_flushed",
            "test_backward.py::test_not_a_number_comes_out_where_the_layers_give_it",
            "test_cuda_gpu.py::test_special_values_reach_the_result",
        ),
    ),
    Row(
        "T11",
        "zeros around the clipped expansion, not around x: x = 0 under biases that show it",
        24,
        (
            "test_numerics.py::test_padding_is_zero_behind_the_expansion",
            "test_triton_numerics.py::test_padding_is_zero_behind_the_expansion",
            "test_cuda_kernels.py::test_padding_is_zero_behind_the_expansion",
        ),
    ),
    Row(
        "T12",
        "canaries: bands of NaN around every tensor neither matter nor change",
        180,
        (
            "test_memory_safety.py::test_neighbours_in_memory_neither_matter_nor_change",
            "test_memory_safety.py::test_what_fresh_memory_holds_does_not_matter",
            "test_plan.py::test_what_fresh_memory_holds_does_not_matter",
            "test_triton_memory.py::test_bands_around_every_tensor",
            "test_triton_memory.py::test_the_bands_notice",
            "test_triton_memory.py::test_every_element_is_written",
            "test_cuda_memory.py",
        ),
    ),
    Row(
        "T13",
        "guard pages before and behind every tensor, and behind all that is allocated in a call",
        200,
        (
            "test_memory_safety.py::test_guard_pages_around_the_inputs",
            "test_memory_safety.py::test_guard_pages_behind_everything_allocated",
            "test_memory_safety.py::test_guard_pages_catch",
            "test_memory_safety.py::test_the_guarded_heap_catches",
            "test_neon.py::test_the_pages_around_memory_catch",
        ),
    ),
    Row(
        "T14",
        "address and undefined-behaviour sanitizers over the C++ and the emulated CUDA kernels",
        1000,
        ("test_sanitized.py", "test_sanitized_extension.py", "test_cuda_memory.py"),
    ),
    Row(
        "T15",
        "threads: calls at the same time on shared weights, and the thread sanitizer",
        20,
        (
            "test_threads_sanitized.py",
            "test_determinism.py::test_calls_at_the_same_time",
            "test_plan_arena.py::test_threads_that_call_one_plan_at_once",
        ),
    ),
    Row(
        "T16",
        "compute-sanitizer's four tools on the GPU, and a seeded fault that they must report",
        1,
        ("test_gpu_checks.py", ON_DEVICE),
        gpu=271,
    ),
    Row(
        "T17",
        "more than 2**31 elements, 70,000 images, and the width of every address",
        6,
        (
            "test_large.py",
            "test_cuda_kernels.py::test_addresses_in_x_are_64_bit",
            "test_triton_interpreted_mutants.py::test_addresses_are_64_bit",
            "test_triton_launch.py::test_a_million_images",
            "test_cuda_gpu.py::test_seventy_thousand_images",
            "test_cuda_gpu.py::test_x_and_y_beyond_31_bits",
            "test_cuda_gpu.py::test_one_image_beyond_31_bits",
            "test_cuda_gpu.py::test_hidden_tensors_beyond_31_bits",
            "test_triton_gpu.py::test_seventy_thousand_images",
            "test_triton_gpu.py::test_x_beyond_31_bits",
            "test_triton_gpu.py::test_one_image_beyond_31_bits",
            "test_triton_gpu.py::test_hidden_tensors_beyond_31_bits",
        ),
        gpu=6,
    ),
    Row(
        "T18",
        "the same bits: on every call, at 1 to 7 threads, at any place in any batch; also backward,"
        " in 16 bits, of fused networks and of plans",
        60,
        (
            "test_determinism.py",
            "test_backward.py::test_the_same_bits_at_any_number_of_threads",
            "test_joined.py::test_same_bits_in_any_batch_and_at_any_number_of_threads",
            "test_plan.py::test_the_same_bits_at_any_threads_and_place",
            "test_plan.py::test_the_same_bits_on_every_call",
            "test_plan.py::test_the_image_of_another_place_does_not_matter",
            "test_cuda_kernels.py::test_an_image_has_the_same_bits_in_every_batch",
            "test_cuda_kernels.py::test_neither_the_schedule_nor_the_grid_changes_a_bit",
            "test_triton.py::test_places_in_a_batch",
            "test_cuda_gpu.py::test_the_same_bits_every_time",
            "test_cuda_gpu.py::test_places_in_a_batch",
            "test_triton_gpu.py::test_the_same_bits_every_time",
            "test_triton_gpu.py::test_places_in_a_batch",
        ),
        gpu=60,
    ),
    Row(
        "T19",
        "bad calls, files and models: the exception, its sentence, and a good call after it",
        100,
        (
            "test_bad_calls.py",
            "test_bad_arguments.py",
            "test_hostile_files.py",
            "test_hostile_models.py",
            "test_hostile_programs.py",
            "test_plan_op.py::test_bad_calls",
            "test_plan_op.py::test_bad_calls_of_the_op",
            "test_plan_op.py::test_bad_weights",
            "test_plan_op.py::test_hostile_programs",
            "test_plan_arena.py::test_bad_arenas",
            "test_cli.py::test_classify_hostile_file",
            "test_cli.py::test_classify_what_is_not_a_file",
            "test_pretrained.py::test_other_weights_are_refused",
            "test_triton_op.py::test_bad_calls",
            "test_triton_op.py::test_tensors_of_two_devices",
            "test_cuda_op.py::test_bad_calls",
            "test_cuda_backend.py::test_what_breaks_the_contract_is_said_by_the_contract",
            "test_ops.py::test_bad_calls_inside_autocast",
            "test_ops.py::test_vmap_is_refused",
            "test_plan_declined.py",
        ),
    ),
    Row(
        "T20",
        "state: pickle, copies, state_dict, dtypes, devices, modes, optimizers, fuse and unfuse",
        40,
        (
            "test_modules.py",
            "test_hostile_state.py",
            "test_hostile_models.py::test_changes_after_fusing",
            "test_whole.py",
            "test_whole_guards.py",
            "test_snapshot.py",
            "test_freeze.py::test_checkpoints_go_both_ways",
            "test_fuse.py::test_unfused_is_bitwise_the_original",
            "test_fuse.py::test_unfuse_gives_the_original_back_with_the_weights_of_now",
            "test_fuse.py::test_fusing_twice_is_no_different",
            "test_models.py::test_unfused_models_are_what_they_were",
        ),
    ),
    Row(
        "T21",
        "torch.compile, export, AOTInductor, ONNX, tracing, autocast, torch.func, DDP and others",
        40,
        (
            "test_compile.py",
            "test_ways_distributed.py",
            "test_ways_export.py",
            "test_ways_func.py",
            "test_ways_modes.py",
            "test_ways_onnx.py",
            "test_ways_tracing.py",
            "test_triton_compile.py",
            "test_cuda_gpu.py::test_compiled",
            "test_cuda_gpu.py::test_autocast_computes_in_the_dtype_asked_for",
            "test_triton_gpu.py::test_compiled",
            "test_triton_gpu.py::test_compiled_gradients",
            "test_triton_gpu.py::test_autocast_computes_in_float16",
        ),
        gpu=15,
    ),
    Row(
        "T22",
        "CUDA graphs with other inputs, streams, no synchronisation, the other GPU",
        0,
        (
            "test_cuda_gpu.py::test_a_graph_replays_with_other_inputs",
            "test_cuda_gpu.py::test_a_call_waits_for_its_own_stream_and_for_no_gpu",
            "test_cuda_gpu.py::test_a_network_of_blocks_in_one_stream",
            "test_cuda_gpu.py::test_the_other_gpu",
            "test_triton_gpu.py::test_a_graph_replays_with_other_inputs",
            "test_triton_gpu.py::test_a_call_never_waits_for_the_gpu",
            "test_triton_gpu.py::test_side_streams",
            "test_triton_gpu.py::test_a_network_of_blocks_in_one_stream",
            "test_triton_gpu.py::test_the_other_gpu",
        ),
        gpu=20,
    ),
    Row(
        "T23",
        "fork, spawn, workers, threads and processes that end",
        10,
        (
            "test_process.py::test_fork",
            "test_process.py::test_workers_of_a_loader",
            "test_process.py::test_spawned_processes",
            "test_process.py::test_threads_that_end_leave_none_behind",
            "test_process.py::test_processes_end",
            "test_plan_arena.py::test_a_fork_while_another_thread_is_in_a_call",
        ),
    ),
    Row(
        "T24",
        "the GIL is free during a call, interrupts, and memory that is refused inside one",
        6,
        ("test_interrupted.py", "test_ops.py::test_other_threads_run_python_during_a_call"),
    ),
    Row(
        "T25",
        "memory: peak of every block, workspace, growth over a thousand calls, larger batches",
        40,
        (
            "test_memory.py",
            "test_workspace.py",
            "test_plan_memory.py",
            "test_freeze.py::test_memory_of_a_fine_tuning_step",
            "test_backward.py::test_nothing_as_large_as_an_expanded_tensor_is_allocated",
            "test_cuda_gpu.py::test_only_the_result_is_allocated",
            "test_triton_gpu.py::test_only_the_result_is_allocated",
        ),
        gpu=40,
    ),
    Row(
        "T26",
        "the process is left alone, and every instruction set computes the same",
        12,
        (
            "test_process.py::test_import_and_calls_leave_the_process_alone",
            "test_process.py::test_a_difference_would_be_seen",
            "test_process.py::test_every_instruction_set",
            "test_process.py::test_the_best_kernel_is_selected_unasked",
            "test_process.py::test_built_with_openmp",
        ),
    ),
    Row("T27", "trained networks on photographs, block by block", 40, ("test_pretrained.py",)),
    Row(
        "T28",
        "builds: without a compiler, without CUDA, with a broken one, offline, sdist and wheel",
        10,
        ("test_build.py",),
    ),
    Row(
        "T29",
        "wrong blocks and wrong kernels are found",
        20,
        (
            "test_mutants.py",
            "test_seeded_bugs.py",
            "test_cuda_mutants.py",
            "test_triton_interpreted_mutants.py",
        ),
    ),
    Row(
        "T30",
        "contents of packages, no network, pinned assets, weights loaded as data",
        6,
        ("test_supply_chain.py",),
    ),
)


def belongs(test: str, pattern: str) -> bool:
    """Whether a test, as `test_file.py::function[parameters]`, is meant by an entry of a row."""
    if pattern.endswith("*"):
        return test.startswith(pattern[:-1])
    return test == pattern or test.startswith((f"{pattern}::", f"{pattern}["))


def rows_of(test: str) -> list[Row]:
    """The rows that a test counts for."""
    return [row for row in ROWS if any(belongs(test, pattern) for pattern in row.tests)]
