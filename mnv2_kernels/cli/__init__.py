"""The command line: `mnv2`, its demo, and the models it knows by name."""

from ..ops.optional import require

require("rich")
