"""Coupled channels of any function: labels of entries, rules of primitives, the walk, execution."""
