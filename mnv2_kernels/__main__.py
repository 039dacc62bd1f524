"""`python -m mnv2_kernels`: the command line."""

import sys

from .cli.main import main

sys.exit(main())
