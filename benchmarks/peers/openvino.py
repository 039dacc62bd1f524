"""OpenVINO on the CPU: in float32, and as it comes, which is bfloat16 where the CPU has it."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import onnx_file
from .peer import Loaded, Peer


def load_float32(folder: Path, x: Tensor, threads: int) -> Loaded:
    return _load(folder, x, {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"})


def load_default(folder: Path, x: Tensor, threads: int) -> Loaded:
    return _load(folder, x, {"INFERENCE_NUM_THREADS": threads})


def _load(folder: Path, x: Tensor, settings: dict[str, object]) -> Loaded:
    import openvino
    from openvino.preprocess import PrePostProcessor

    core = openvino.Core()
    model = core.read_model(folder / onnx_file.FILE)
    is_image = len(model.output().get_partial_shape()) == 4
    layouts = PrePostProcessor(model)
    # x is NHWC already, and so may the result be: no reordering at the ends.
    nchw, nhwc = openvino.Layout("NCHW"), openvino.Layout("NHWC")
    layouts.input().tensor().set_layout(nhwc)
    layouts.input().model().set_layout(nchw)
    if is_image:
        layouts.output().model().set_layout(nchw)
        layouts.output().tensor().set_layout(nhwc)
    settings |= {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    request = core.compile_model(layouts.build(), "CPU", settings).create_infer_request()
    given = x.permute(0, 2, 3, 1).numpy()
    request.set_input_tensor(openvino.Tensor(given, shared_memory=True))

    def output() -> Tensor:
        y = torch.from_numpy(request.get_output_tensor().data.copy())
        return y.permute(0, 3, 1, 2) if is_image else y

    return Loaded(request.infer, output, holds=given)


def why_not_bfloat16() -> str | None:
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":
        return "oneDNN is held back to AVX2, where openvino loads no model in bfloat16"
    return _why_no_bfloat16_on_cpu()


@cache
def _why_no_bfloat16_on_cpu() -> str | None:
    """Asked in a process of its own: this one is to stay free of the library and its threads."""
    question = "Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')"
    asked = f"from openvino import Core; print({question})"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"status {done.returncode}"
        return f"openvino cannot be used: {said.splitlines()[-1]}"
    if "BF16" in done.stdout:
        return None
    return "the default is float32 on this CPU, and openvino is that already"


PACKAGES = ("openvino", *onnx_file.PACKAGES)
MODULES = ("openvino", "openvino.preprocess")
PEERS = (
    Peer("openvino", load_float32, onnx_file.convert, PACKAGES, MODULES),
    Peer(
        "openvino-bf16",
        load_default,
        onnx_file.convert,
        PACKAGES,
        MODULES,
        precision="bfloat16",
        needs=why_not_bfloat16,
    ),
)
