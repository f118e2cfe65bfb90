"""Modelled arithmetic and DRAM traffic of the GEMMs that a model executes."""

from fairseq_dsq.cost.profiles import Cost, PaperProfile, total_cost

__all__ = ["Cost", "PaperProfile", "total_cost"]
