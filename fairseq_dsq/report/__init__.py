"""Tables and figures from the records of trainings."""

import logging

# fairseq leaves the root logger at DEBUG, and matplotlib narrates every file and font that it looks at.
logging.getLogger("matplotlib").setLevel(logging.WARNING)
# So does sacreBLEU, of each step of a test.
logging.getLogger("sacrebleu").setLevel(logging.WARNING)
