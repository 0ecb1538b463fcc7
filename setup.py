"""A thin bridge: setuptools asks for an extension, CMakeLists.txt describes it, Ninja builds it."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cuda = os.environ.get("PDDM_CUDA", "auto")
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}-cuda-{cuda}"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-DPDDM_PYTHON_MODULE=ON",
            "-DPDDM_TESTS=OFF",
            f"-DPDDM_CUDA={cuda}",
            f"-DPDDM_TORCH_ROOT={Path(torch.__file__).parent}",
            f"-DPDDM_TORCH_VERSION={torch.__version__}",
            f"-DPDDM_TORCH_CUDA={torch.version.cuda or ''}",
            f"-DPDDM_INSTALL_DIR={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


setup(ext_modules=[Extension("pddm_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
