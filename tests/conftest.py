"""Set-up shared by all tests."""

import pytest
import torch

# torchvision's compiled ops cannot load next to a CPU-only torch, yet its models need only the
# names of these two to be imported.
_torchvision_ops = torch.library.Library("torchvision", "FRAGMENT")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    _torchvision_ops.define(_schema)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
