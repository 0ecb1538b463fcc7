"""Prints the folder of the torch to build against, its version and the version of its CUDA, or "none": a line each.

torch is not imported: a build for one Python may use the headers of a torch that only another can import.
"""

import importlib.util
import os
import runpy
import sys

root = sys.argv[1]
if not root:
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        sys.exit(
            f"{sys.executable} has no torch to build against. Install one, or name the folder of another by "
            "PDDM_TORCH_ROOT; 'pip install' without --no-build-isolation brings its own."
        )
    root = os.path.dirname(torch.origin)
version_file = os.path.join(root, "version.py")
if not os.path.isfile(version_file):
    sys.exit(f"{root} is not the folder of a torch: it has no version.py")
version = runpy.run_path(version_file)
for line in (os.path.abspath(root), version["__version__"], version.get("cuda") or "none"):
    sys.stdout.buffer.write(os.fsencode(f"{line}\n"))
