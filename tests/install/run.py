"""Installs the package as users do, in the ways and places where that has failed: ``make test-install``.

Run by the Python of .venv, whose torch and build tools every environment made here finds without installing them again.
Isolated builds fetch their own, as pip does. Objects are compiled once and then looked up (recompile.py); every build
is otherwise the one that users get, and each ends with a run of the package from a folder that is not the checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SITE = Path(sysconfig.get_path("purelib"))
TORCH = SITE / "torch"
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
TIMEOUT = 900

# Capabilities without which root, too, is refused by a file's mode.
UNPRIVILEGED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


class Failed(Exception):
    pass


def run(*command: object, cwd: Path, unprivileged: bool = False, **environment: str) -> str:
    line = [str(part) for part in (*(UNPRIVILEGED if unprivileged else ()), *command)]
    done = subprocess.run(
        line,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise Failed(f"{' '.join(line)}\nin {cwd} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


class Place:
    """A temporary folder with the checkout under test, and whatever is installed from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        store = folder / "objects"
        store.mkdir()
        os.environ["CMAKE_CXX_COMPILER_LAUNCHER"] = f"{sys.executable};-I;{HERE / 'recompile.py'};{store}"
        os.environ["PYTHONDONTWRITEBYTECODE"] = (
            "1"  # a run from an editable installation leaves nothing in the checkout
        )
        self.shared = folder / "shared"
        self.shared.mkdir()
        for entry in SITE.iterdir():
            if "pddm" not in entry.name and entry.suffix != ".pth":
                (self.shared / entry.name).symlink_to(entry)
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
        self.sources = sorted(name for name in listed if name and (ROOT / name).is_file())
        self.checkout = folder / "Käfer & Co (größer)" / "pddm ext"
        for name in self.sources:
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.checkout / name)
        self.package = sorted(name for name in self.sources if name.startswith("pddm_ext/"))

    def environment(self, name: str) -> Path:
        """The Python of a new environment, with torch, pip and the build tools, and without this package."""
        home = self.folder / "environments" / name
        run(sys.executable, "-m", "venv", "--without-pip", home, cwd=self.elsewhere)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(f"{self.shared}\n")
        return home / "bin" / "python"

    def leave_behind_an_older_build(self) -> None:
        """What version 0.1.0 left, built with setuptools in an environment that is gone and in another place."""
        gone = "/tmp/pip-build-env-gone/overlay"
        tag = f"{sys.implementation.cache_tag}-torch2.13.0+cpu-cuda-auto"
        old = {
            f"build/{tag}/CMakeCache.txt": f"CMAKE_HOME_DIRECTORY:INTERNAL=/gone/pddm_ext\n"
            f"CMAKE_CACHEFILE_DIR:INTERNAL=/gone/pddm_ext/build/{tag}\nCMAKE_COMMAND:INTERNAL={gone}/bin/cmake\n"
            f"CMAKE_MAKE_PROGRAM:FILEPATH={gone}/bin/ninja\npybind11_DIR:PATH={gone}/pybind11\n",
            f"build/{tag}/build.ninja": "rule gone\n  command = false\nbuild all: gone\n",
            "build/native/CMakeCache.txt": "CMAKE_HOME_DIRECTORY:INTERNAL=/gone/pddm_ext\n",
            "build/lib/pddm_ext/gone.py": "",
            f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/pddm_ext/gone.py": "",
            f"pddm_ext/{MODULE}": "not a module any more",
            "pddm_ext.egg-info/PKG-INFO": "Metadata-Version: 2.4\nName: pddm-ext\nVersion: 0.0.1\n",
            "pddm_ext.egg-info/SOURCES.txt": "setup.py\npddm_ext/gone.py\n",
            ".venv/bin/python": "#!/gone/python\n",
            ".venv/bin/pip": "#!/gone/python\n",
            ".venv/tools": "",
            ".venv/installed": "",
        }
        for name, text in old.items():
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (self.checkout / name).write_text(text)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """An installation writes nothing beside the source, whose next one can then find nothing."""

        def state() -> dict[str, tuple[int, int]]:
            found = [path for path in self.checkout.rglob("*") if not path.is_symlink()]
            return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

        before = state()
        yield
        changed = dict(set(state().items()) ^ set(before.items()))
        if changed:
            raise Failed(f"the checkout was changed: {', '.join(sorted(changed))}")

    def install(
        self, python: Path, *what: str, cwd: Path | None = None, unprivileged: bool = False, **environment: str
    ) -> None:
        run(python, "-m", "pip", "install", *what, cwd=cwd or self.checkout, unprivileged=unprivileged, **environment)

    def check(self, python: Path, editable: bool = False) -> None:
        """From elsewhere: the command, a small batch, and that no file was taken but the package's own."""
        told = run(python.with_name("pddm-ext"), "info", cwd=self.elsewhere)
        if "pddm-ext" not in told or "in use" not in told:
            raise Failed(f"pddm-ext info said:\n{told}")
        found = Path(run(python, HERE / "used.py", cwd=self.elsewhere).splitlines()[-1])
        (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
        home = self.checkout if editable else site
        if found != home / "pddm_ext" / "__init__.py":
            raise Failed(f"{found} was used, not what was installed into {home}")
        (record,) = site.glob("pddm_ext-*.dist-info/RECORD")
        taken = {line.split(",")[0] for line in record.read_text().splitlines()}
        taken = {name for name in taken if name.startswith("pddm_ext/") and "__pycache__" not in name}
        expected = {f"pddm_ext/{MODULE}"} | (set() if editable else set(self.package))
        if taken != expected:
            raise Failed(f"missing: {expected - taken}; not the package's: {taken - expected}")

    # --- The cases ----------------------------------------------------------------------------------------------------

    def install_twice(self, name: str, *isolation: str) -> None:
        python = self.environment(name)
        for _ in range(2):
            self.install(python, *isolation, ".")
            self.check(python)

    def install_once(
        self, name: str, *what: str, editable: bool = False, unprivileged: bool = False, **environment: str
    ) -> None:
        python = self.environment(name)
        self.install(python, *what, unprivileged=unprivileged, **environment)
        self.check(python, editable)

    def make_read_only(self) -> None:
        moved = self.folder / "moved"
        moved.mkdir()
        self.checkout = self.checkout.rename(moved / "pddm_ext")
        run("chmod", "-R", "a-w", self.checkout, cwd=self.elsewhere)
        try:
            run("touch", self.checkout / "README.md", self.checkout / "new", cwd=self.elsewhere, unprivileged=True)
        except Failed:
            return
        raise Failed("the checkout is not read-only: it can be written to")

    def make_development_environment(self) -> None:
        """As `make demo` begins, over a .venv and a build of another place; the second time there is nothing to do."""
        make = ["make", ".venv/installed", "EXTRAS=", f"PYTHON={sys.executable}"]
        run(*make, cwd=self.checkout)
        self.check(self.checkout / ".venv" / "bin" / "python", editable=True)
        run(*make, "--question", cwd=self.checkout)

    def make_wheel(self) -> None:
        run("make", "wheel", f"PYTHON={sys.executable}", cwd=self.checkout)
        wheels = sorted((self.checkout / "dist").iterdir())
        self.wheel = next(path for path in wheels if path.suffix == ".whl")
        if "manylinux" not in self.wheel.name or len(wheels) != 2:
            raise Failed(f"dist has {[path.name for path in wheels]}")
        print(f"       {self.wheel.name}", flush=True)

    def install_the_wheel(self) -> None:
        """Where there is nothing but Python: pip brings torch and numpy."""
        home = self.folder / "environments" / "empty"
        run(sys.executable, "-m", "venv", home, cwd=self.elsewhere)
        self.install(home / "bin" / "python", str(self.wheel), "torch==2.13.0", cwd=self.elsewhere)
        self.check(home / "bin" / "python")

    def install_under(self, python: Path, archive: str) -> None:
        """A build against this Python's torch; one that the other Python can import is rarely there."""
        name = python.name if python.name != "python" else python.parents[1].name
        home = self.folder / "environments" / name
        try:
            run(python, "-c", "import torch", cwd=self.elsewhere)
            has_torch = True
        except Failed:
            has_torch = False
        run(python, "-m", "venv", *(["--system-site-packages"] if has_torch else []), home, cwd=self.elsewhere)
        own = home / "bin" / "python"
        tools = ["scikit-build-core>=1.1", "pybind11>=2.12", "cmake>=3.18", "ninja"]
        run(own, "-m", "pip", "install", *tools, cwd=self.elsewhere)
        where = {} if has_torch else {"PDDM_TORCH_ROOT": str(TORCH)}
        run(own, "-m", "pip", "install", "--no-build-isolation", "--no-deps", archive, cwd=self.elsewhere, **where)
        if has_torch:
            self.check(own)
            return
        told = run(own, HERE / "other_python.py", TORCH, cwd=self.elsewhere)
        print(
            f"       {told.strip()}\n       not run: this Python has no torch, whose wheel for it is not fetched here"
        )


def other_pythons() -> Iterator[Path]:
    """The Pythons 3.10 and later of this machine, but for the one that runs this: on the PATH, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for minor in range(10, 20):
        if minor == sys.version_info.minor:
            continue
        places = [shutil.which(f"python3.{minor}"), *sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python3.{minor}"))]
        for place in places:
            # pyenv has a python3.x for each on the PATH, most of which only say that another must be chosen.
            if place and not subprocess.run([place, "-c", ""], capture_output=True).returncode:
                yield Path(place)
                break
        else:
            if minor <= 13:
                print(f"not run: Python 3.{minor} is not installed here", flush=True)


def together(*rows: dict[str, Callable[[], None]]) -> None:
    """Rows of cases side by side, each row in order up to one that fails; the run then ends when all rows have."""
    failures: list[str] = []

    def in_order(cases: dict[str, Callable[[], None]]) -> None:
        for name, case in cases.items():
            begun = time.monotonic()
            try:
                case()
            except Exception as error:
                failures.append(name)
                print(f"FAILED {name}\n{error}", flush=True)
                return
            print(f"ok     {name}, {time.monotonic() - begun:.0f} s", flush=True)

    threads = [threading.Thread(target=in_order, args=(cases,)) for cases in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pddm-install-") as folder:
        os.environ["TMPDIR"] = folder
        place = Place(Path(folder))
        place.leave_behind_an_older_build()
        free = ["--no-build-isolation"]
        with place.unchanged():
            together(
                {"twice, isolated": lambda: place.install_twice("isolated")},
                {"twice, with the environment's own tools": lambda: place.install_twice("own", *free)},
            )
        place.make_read_only()
        sdist = place.folder / "sdist"
        build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", sdist]
        with place.unchanged():
            # All at once, from one checkout.
            together(
                {"moved and read-only, isolated": lambda: place.install_once("moved-isolated", ".", unprivileged=True)},
                {
                    "moved and read-only": lambda: place.install_once("moved", *free, ".", unprivileged=True),
                    "a source archive": lambda: run(*build, cwd=place.checkout, unprivileged=True) and None,
                },
                {
                    "moved and read-only, editable": lambda: place.install_once(
                        "editable", *free, "--editable", ".", editable=True, unprivileged=True
                    )
                },
            )
        (archive,) = map(str, sdist.iterdir())
        run("chmod", "-R", "u+w", place.checkout, cwd=place.elsewhere)
        # What writes into the checkout, beside what is installed from the archive alone.
        together(
            {
                "make in a moved checkout": place.make_development_environment,
                "make wheel": place.make_wheel,
                "the wheel in an empty environment": place.install_the_wheel,
            },
            {
                "from a source archive, isolated": lambda: place.install_once("archive-isolated", archive),
                "from a source archive": lambda: place.install_once("archive", *free, archive),
                "by a compiler that links its C++ library in": lambda: place.install_once(
                    "static", *free, archive, LDFLAGS="-static-libstdc++ -static-libgcc"
                ),
                **{
                    f"under {python}": lambda python=python: place.install_under(python, archive)
                    for python in other_pythons()
                },
            },
        )


if __name__ == "__main__":
    main()
