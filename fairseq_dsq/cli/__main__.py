"""``python -m fairseq_dsq.cli``."""

import sys

from fairseq_dsq.cli import main

sys.exit(main())
