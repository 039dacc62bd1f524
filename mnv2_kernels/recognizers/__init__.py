"""Reading what a forward computes, and saying it in the words of `block`.

A forward runs once on a stand-in of a tensor (`trace`), which records the operations that it
understands (`operations`); these are put together to layers and blocks (`assemble`). Nothing is
known of any class or library: what counts is what runs. docs/recognizers.md says more.
"""

from .assemble import layers_of, spans_of
from .checks import check_module, evaluation_mode, unrecorded, with_originals
from .declined import Declined
from .layers import AverageLayer, ConvLayer, Layer, LinearLayer, Reading, block_of
from .read import (
    follow,
    guess_channels,
    has_depthwise,
    is_depthwise_weight,
    is_image_weight,
    may_have_block,
    read,
    read_unknown,
    runs_in_order,
    same_layers,
)
from .trace import Recorded

__all__ = [
    "AverageLayer",
    "ConvLayer",
    "Declined",
    "Layer",
    "LinearLayer",
    "Reading",
    "Recorded",
    "block_of",
    "check_module",
    "evaluation_mode",
    "follow",
    "guess_channels",
    "has_depthwise",
    "is_depthwise_weight",
    "is_image_weight",
    "may_have_block",
    "layers_of",
    "read",
    "read_unknown",
    "runs_in_order",
    "same_layers",
    "spans_of",
    "unrecorded",
    "with_originals",
]
