"""`python -m lact_kernels.asr` is `lact-asr`, for launchers that start modules: `accelerate launch -m`."""

import sys

from lact_kernels.asr.cli import main

sys.exit(main())
