"""A compiler launcher that compiles nothing twice: ``recompile.py STORE COMPILER ARGUMENT...``.

tests/install builds the same sources in a dozen places. What decides an object file, the preprocessed source and the
options, is looked up in STORE. (ccache would look up the places, too.)
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(store: Path, compiler: str, arguments: list[str]) -> int:
    if "-c" not in arguments or "-o" not in arguments:
        return subprocess.run([compiler, *arguments]).returncode
    at = arguments.index("-o")
    target = Path(arguments[at + 1])
    preprocess = [a for a in arguments[:at] + arguments[at + 2 :] if a != "-c"]
    # As a compilation would, this writes the list of headers that -MD -MF ask for.
    source = subprocess.run([compiler, "-E", "-P", *preprocess], stdout=subprocess.PIPE)
    if source.returncode:
        return source.returncode
    # The standard first, which decides the same wherever it stands: before the others for one cmake, and behind for
    # another, as an isolated build may find.
    options = [a for a in arguments if a.startswith("-std")]
    options += [a for a in arguments if a.startswith(("-f", "-m", "-O", "-W", "-g"))]
    version = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, check=True).stdout
    kept = store / hashlib.sha256(b"\0".join([version, "\0".join(options).encode(), source.stdout])).hexdigest()
    if not kept.exists():
        failed = subprocess.run([compiler, *arguments]).returncode
        if failed:
            return failed
        part = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, part)
        part.replace(kept)
    shutil.copyfile(kept, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
