"""Edges: the contract of their engines, and the fast one."""
