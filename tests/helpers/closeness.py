"""How near a fused float32 network must be to the layers it was made from."""

import torch


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
