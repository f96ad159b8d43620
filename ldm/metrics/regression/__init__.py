"""Metrics from regressions between units and factor values: DCI variants, DCI-ES, MCC and R2."""
