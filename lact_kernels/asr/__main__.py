"""`python -m lact_kernels.asr`, which is `lact-asr`: what `accelerate launch -m` can start."""

import sys

from lact_kernels.asr.cli import main

sys.exit(main())
