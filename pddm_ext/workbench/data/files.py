"""Where the files of a data set are: in a folder, or in a zip archive that is read without being unpacked."""

from __future__ import annotations

import functools
import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

#: What zipfile raises at an archive that is damaged, encrypted or compressed by what it does not know.
DAMAGED = (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, RuntimeError, ValueError)

#: Of a compressed file (JPEG, PNG, GIF, WebP, AVIF, HEIC) of more than ``_WHOLE`` bytes, :func:`stamp` reads ``_END``
#: at either end: an edit changes its size, or all that is compressed after it, or a check sum there. Tens of thousands
#: of photographs then take seconds, where reading all of them may take minutes, in every process that loads them.
_WHOLE, _END = 2**20, 2**16
_COMPRESSED = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF")


@dataclass(frozen=True)
class Archive:
    """A folder in a zip archive.

    Attributes:
        path: of the archive.
        inside: the folder in it, empty or ending with a slash.
    """

    path: Path
    inside: str = ""

    def __str__(self) -> str:
        return str(self.path / self.inside)

    def names(self) -> list[str]:
        """The archive's members, by their whole names.

        Raises:
            ValueError: not a readable archive.
            OSError: there is no such file, or it may not be read.
        """
        return list(self._members().namelist())

    def read(self, name: str) -> bytes:
        """The content of a file in the folder.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is damaged.
        """
        members = self._members()
        try:
            return members.read(self.inside + name)
        except KeyError as error:
            raise FileNotFoundError(2, "no such file in the archive", str(self)) from error
        except Exception as error:  # of whatever its compression raises at damaged data
            raise ValueError(f"{self}{'' if self.inside else '/'}{name}: {error}") from error

    def size(self, name: str) -> int:
        """Bytes of a file in the folder, 0 where there is none."""
        try:
            return self._members().getinfo(self.inside + name).file_size
        except KeyError:
            return 0

    def crc(self, name: str) -> int:
        """CRC-32 of a file in the folder, as the archive has it noted; 0 where there is none."""
        try:
            return self._members().getinfo(self.inside + name).CRC
        except KeyError:
            return 0

    def _members(self) -> zipfile.ZipFile:
        # Anew in a process that was forked, which would share its place in the file, and where the file was replaced.
        state = os.stat(self.path)
        return _opened(self.path, os.getpid(), state.st_mtime_ns, state.st_size)


@functools.lru_cache(4)
def _opened(path: Path, process: int, modified: int, size: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except DAMAGED as error:
        raise ValueError(f"{path}: not a readable archive ({error})") from error


def size(folder: Path | Archive, name: str) -> int:
    """Bytes of a file in a folder, 0 where there is none."""
    if isinstance(folder, Archive):
        return folder.size(name)
    path = folder / name
    return path.stat().st_size if path.is_file() else 0


def stamp(folder: Path | Archive, name: str) -> str:
    """Tells a file in a folder from others: its size, and CRC-32 of its bytes, the same in an archive and unpacked."""
    length = size(folder, name)
    crc = 0
    if isinstance(folder, Archive) and length <= _WHOLE:
        crc = folder.crc(name)
    elif length:
        try:
            with opened(folder, name) as file:
                start = file.read(_END)
                crc = zlib.crc32(start)
                if length > _WHOLE and (start.startswith(_COMPRESSED) or start[4:8] == b"ftyp"):
                    file.seek(-_END, os.SEEK_END)
                while block := file.read(_WHOLE):
                    crc = zlib.crc32(block, crc)
        except (OSError, ValueError):  # which reading will name
            crc = 0
    return f"{length} {crc:08x}"


def opened(folder: Path | Archive, name: str) -> IO[bytes]:
    """A file in a folder, to read.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: its archive is damaged.
    """
    return io.BytesIO(folder.read(name)) if isinstance(folder, Archive) else open(folder / name, "rb")


def outside(names: Sequence[str]) -> str | None:
    """The first of these names that would lead out of a folder; None where none does."""
    for name in names:
        path = PureWindowsPath(name)  # knows both kinds of slash, and drives
        if path.anchor or ".." in path.parts or ".." in PurePosixPath(name).parts:
            return name
    return None


def listed(names: Sequence[str]) -> None:
    """Refuse the pictures of an index where one leads out of its folder, or stands there twice.

    Raises:
        ValueError: it does; the message says which, or what.
    """
    astray = outside(names)
    if astray is not None:
        raise ValueError(f"{astray} leads out of its folder")
    if len(set(names)) < len(names):
        raise ValueError("it lists a picture twice")
