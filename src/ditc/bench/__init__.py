"""Measuring candidates against each other: the harness of ``ditc bench`` and of the suites in ``benchmarks/``."""
