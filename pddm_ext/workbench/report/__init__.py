"""A comparison on one page: its words, curves and pictures."""
