"""Spaces of known factors, and one module for each published factor data set."""

from ldm.data.factors.space import FactorSpace, Subspace, factor_space

__all__ = ["FactorSpace", "Subspace", "factor_space"]
