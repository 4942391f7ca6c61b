"""Measurements that take longer than `vitfreeze bench`: run from a checkout, no part of the wheel."""
