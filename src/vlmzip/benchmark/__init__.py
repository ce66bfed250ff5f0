"""Measuring speed and memory: what compression costs, and what it saves."""
