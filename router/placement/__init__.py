"""Placement: which peer should hold which layers. README.md of this folder lists the modules."""
