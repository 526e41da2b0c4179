"""Decisions as pure functions: no Dagster, no I/O, no clock, no randomness."""
