"""LiteRT (formerly TensorFlow Lite), whose CPU delegate is XNNPACK."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .peer import Loaded, Peer

FILE = "model.tflite"


def convert(model: nn.Module, x: Tensor, folder: Path) -> None:
    import litert_torch

    # NHWC is what XNNPACK computes in; without this the file begins and ends with a transpose.
    outputs = [0] if model(x).dim() == 4 else None
    nhwc = litert_torch.to_channel_last_io(model, args=[0], outputs=outputs).eval()
    converted = litert_torch.convert(nhwc, (x.permute(0, 2, 3, 1).contiguous(),))
    converted.export(str(folder / FILE))


def load(folder: Path, x: Tensor, threads: int) -> Loaded:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(folder / FILE), num_threads=threads)
    interpreter.allocate_tensors()
    interpreter.set_tensor(
        interpreter.get_input_details()[0]["index"], x.permute(0, 2, 3, 1).numpy()
    )
    index = interpreter.get_output_details()[0]["index"]

    def output() -> Tensor:
        y = torch.from_numpy(interpreter.get_tensor(index))
        return y.permute(0, 3, 1, 2) if y.dim() == 4 else y

    return Loaded(interpreter.invoke, output)


PEERS = (
    Peer(
        "litert",
        load,
        convert,
        ("ai-edge-litert", "litert-torch"),
        ("ai_edge_litert.interpreter",),
    ),
)
