"""Under a Python without torch: loads the installed native module beside the torch at argv[1] and asks what it is."""

import ctypes
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

version = importlib.metadata.version("pddm-ext")
(module,) = Path(importlib.util.find_spec("pddm_ext").submodule_search_locations[0]).glob("_C.*.so")
ctypes.CDLL(f"{sys.argv[1]}/lib/libtorch_cpu.so", ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("pddm_ext._C", module)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert native.cpu_capabilities()[native.cpu_capability()]
print(json.dumps({"python": sys.version.split()[0], "pddm-ext": version, **native.build_info()}))
