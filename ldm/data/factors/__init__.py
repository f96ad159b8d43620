"""Spaces of known factors, and one module for each published data set with factors."""

from ldm.data.factors.space import FactorSpace, Subspace, factor_space

__all__ = ["FactorSpace", "Subspace", "factor_space"]
