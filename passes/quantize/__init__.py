"""Rewrites that compute in fewer bits, with ranges found while the graph runs."""
