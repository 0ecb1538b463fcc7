"""Stands for a package that is not there, in child processes that run the workbench: Fabric would import it, and all
that it imports, to look at its version."""

raise ImportError("as in an environment with the extra train alone")
