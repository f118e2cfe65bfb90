"""Tables and figures from training logs."""

import logging

# fairseq leaves the root logger at DEBUG, and these narrate every file and font that they look at.
for _name in ("matplotlib", "tensorboard"):
    logging.getLogger(_name).setLevel(logging.WARNING)
