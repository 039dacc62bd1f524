"""Types of what the public functions return, for annotations.

>>> from mnv2_kernels.types import Plan, Report
>>> def schedule_of(model: nn.Module) -> Plan:
...     return mk.plan(model, (3, 224, 224))
"""

from .fuse.report import Report, Row
from .modules.mobilenet_v2 import MobileNetV2
from .network.plan import CapturedPlan, Plan

__all__ = ["CapturedPlan", "MobileNetV2", "Plan", "Report", "Row"]
