"""Benchmarks: each measures ours beside its peers and ceilings on one mongod in one run, so that ratios count, not machines."""

from __future__ import annotations
