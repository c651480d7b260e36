"""Benchmarks: ``python -m benchmarks --help`` from the root of the repository.

Read in this order: ``harness`` (interleaving, ratios, red checks), ``environment`` (what ran where), ``report`` (JSON,
Markdown, table), then the suites: ``step_latency`` with ``model``, ``candidates`` and ``breakdown``, and
``guard_overhead``.
"""
