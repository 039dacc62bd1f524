"""ONNX Runtime, its CPU provider."""

from pathlib import Path

import torch
from torch import Tensor

from . import onnx_file
from .peer import Loaded, Peer


def load(folder: Path, x: Tensor, threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads may spin within a run, but not on into the turn of another process.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        str(folder / onnx_file.FILE), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    # NCHW: the kernels reorder to channels in groups of 16 as they read it.
    given = onnxruntime.OrtValue.ortvalue_from_numpy(x.contiguous().numpy())
    binding.bind_ortvalue_input(onnx_file.INPUT, given)
    binding.bind_output(onnx_file.OUTPUT)
    return Loaded(
        lambda: session.run_with_iobinding(binding),
        lambda: torch.from_numpy(binding.copy_outputs_to_cpu()[0]),
    )


PACKAGES = ("onnxruntime", *onnx_file.PACKAGES)
PEERS = (Peer("onnxruntime", load, onnx_file.convert, PACKAGES, ("onnxruntime",)),)
