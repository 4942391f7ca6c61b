"""Measurements of the parts of a run."""
