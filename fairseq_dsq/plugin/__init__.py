"""Everything that knows fairseq and is no registration: flags, conversion, schedule state, hooks, checkpoints."""
