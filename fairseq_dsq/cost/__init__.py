"""Modelled arithmetic and DRAM traffic of the GEMMs that a model executes, and the Roofline that bounds them."""

from fairseq_dsq.cost.profiles import Cost, CostProfile, load_profile, register, total_cost

__all__ = ["Cost", "CostProfile", "load_profile", "register", "total_cost"]
