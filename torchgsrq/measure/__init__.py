"""Measurements: quality relative to full precision, retrieval, settings from a config; and the demo's model."""
