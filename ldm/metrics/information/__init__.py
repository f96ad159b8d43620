"""Metrics from the information between single units and single factors, besides MIG and modularity."""
