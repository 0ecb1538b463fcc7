"""The workbench: train an embedding for retrieval on some classes, search among classes never seen, compare methods.

Needs the extra ``train``; nothing else in the package imports this one.
"""
