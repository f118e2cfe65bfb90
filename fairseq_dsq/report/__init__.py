"""Tables and figures from training logs."""
