"""The life cycle of an embedded PostgreSQL: started by its first user, stopped by its last, whoever dies how.

- *Users are counted by shared locks* on one file: the kernel drops the lock of a process that dies. Every start and
  stop holds a second, exclusive lock, so that racing first starts are one start.
- *A live pid proves nothing* (a zombie that nobody reaped, a pid that a reboot gave to another program): the server is
  up if it answers on its socket and says that it serves this very folder.
- *Root may not run PostgreSQL*: the programs then run as an existing account without rights, which owns the data.
- The socket lies in the temporary folder, because its path must stay short; ``postmaster.pid`` says where.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal, Self
from urllib.parse import quote

import psycopg
from psycopg import errors as pg
from psycopg import sql

from durable.errors import ConfigurationError
from durable.postgres.binaries import Binaries, copy_for_all, find, usable_by

if sys.platform != "win32":
    import fcntl
    import pwd

LIMIT: Final = 60.0  # seconds that anything here may take
LOOK: Final = 0.05  # seconds between two looks at something that others change
PATIENCE: Final = 20.0  # seconds for an orderly end, before it is a crash
ANSWER: Final = 10  # seconds that a server has to answer a connection
PORT: Final = 5432  # names the socket file; nothing listens on the network
SOCKET_PATH: Final = 103  # bytes that every system allows
ACCOUNTS: Final = ("postgres", "nobody")  # who runs PostgreSQL for root
ROOTS_BASE: Final = Path("/var/lib/durable")  # where root keeps what would lie under a closed home
FULL: Final = ("too many clients", "connection slots are reserved")  # a busy server is one that is up

THROW_AWAY: Final = (
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "dynamic_shared_memory_type=mmap",  # in the data folder: nothing is left over when that goes
)


@dataclass(frozen=True, slots=True)
class Account:
    """Who runs PostgreSQL. `other` if that is not who we are: only root can and must."""

    uid: int
    gid: int
    other: bool


class EmbeddedPostgres:
    """A PostgreSQL in a folder, shared by all processes that start it there.

    ``options`` are server settings (``"max_connections=200"``), taken by the process that starts the server.
    ``fsync=False`` is for throw-away servers: fast, unsafe, and the first user gets an empty one.
    """

    def __init__(self, root: Path | str = ".durable", *, options: Sequence[str] = (), fsync: bool = True) -> None:
        if sys.platform == "win32":
            raise ConfigurationError(
                "the embedded PostgreSQL needs Linux or macOS: set DURABLE_DATABASE_URL to a running server"
            )
        self.root = Path(root).resolve()
        self.options = (*options, *(() if fsync else THROW_AWAY))
        self.throw_away = not fsync
        self._users: IO[str] | None = None
        self._owner = 0  # the process that started it: a fork of it must not stop the server
        self._place: _Place | None = None

    # -- what one does with it

    def start(self) -> Self:
        """Start the server, or join the one that runs already. Started twice, it is looked after: is it still up?"""
        try:
            with self._alone():
                if self._users is not None:
                    self._ensure_up()
                    return self
                users = (self.root / "users.lock").open("w")
                try:
                    self._place = _Place.of(self.root)
                    if self.throw_away and _try_lock(users):
                        self._discard()
                        self._place.log.unlink(missing_ok=True)
                    self._ensure_up()
                    _wait(lambda: _try_lock(users, shared=True), f"a lock on {users.name}")
                except BaseException:
                    users.close()
                    raise
        except OSError as error:
            raise ConfigurationError(
                f"cannot keep a PostgreSQL in {self.root}: {error}. "
                "Set DURABLE_DATA_DIR to a folder of yours, or DURABLE_DATABASE_URL to a running server"
            ) from error
        self._users, self._owner = users, os.getpid()
        atexit.register(self.stop)
        return self

    def stop(self) -> None:
        """Leave the server; the last user stops it."""
        if self._users is None or self._owner != os.getpid():
            return
        atexit.unregister(self.stop)
        with self._alone():
            if _try_lock(self._users):
                self._stop_server("immediate" if self.throw_away else "fast")
                if self.throw_away:
                    self._discard()
                self._clear_leftovers()
                with suppress(OSError):
                    self._at.socket_folder.rmdir()
            self._users.close()
            self._users = None

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server under its users and start it again; ``immediate`` is a crash."""
        with self._alone():
            self._stop_server(mode)
            self._ensure_up()

    def dsn(self, dbname: str = "durable") -> str:
        """A libpq URL of that database, which is created if it is missing."""
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            known = connection.execute("select 1 from pg_database where datname = %s", [dbname]).fetchone()
            if not known:
                # Either error, as it happens, if somebody else was faster.
                with suppress(pg.DuplicateDatabase, pg.UniqueViolation):
                    connection.execute(sql.SQL("create database {}").format(sql.Identifier(dbname)))
        return self._url(dbname)

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, as its pid file has it."""
        return _pid_file(self._at.data).pid

    @property
    def log(self) -> Path:
        return self._at.log

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- how it is done

    @property
    def _at(self) -> _Place:
        if self._place is None:
            raise ConfigurationError(f"the embedded PostgreSQL in {self.root} was not started")
        return self._place

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else starts or stops this server meanwhile."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / ".gitignore").write_text("*\n", encoding="utf-8")
        with (self.root / "start.lock").open("w") as lock:
            _wait(lambda: _try_lock(lock), f"{lock.name}, which another process holds")
            yield

    def _url(self, dbname: str) -> str:
        folder = _pid_file(self._at.data).socket_folder or self._at.socket_folder
        return f"postgresql://postgres@/{quote(dbname, safe='')}?host={quote(str(folder))}&port={PORT}"

    def _ensure_up(self) -> None:
        if self._up():
            return
        binaries = self._binaries()
        if not (self._at.data / "PG_VERSION").exists():
            self._create(binaries)
        self._at.make_socket_folder()
        self._clear_leftovers()
        self._launch(binaries)

    def _up(self) -> bool:
        """Does a server answer that serves this folder? One that starts, recovers or shuts down is waited for."""
        end = time.monotonic() + LIMIT
        while (pid := self.pid) is not None:
            error: psycopg.OperationalError | None = None
            if _pid_file(self._at.data).socket_folder is not None:
                try:
                    with psycopg.connect(self._url("postgres"), connect_timeout=ANSWER, autocommit=True) as connection:
                        row = connection.execute("select current_setting('data_directory')").fetchone()
                        return row is not None and Path(row[0]).resolve() == self._at.data
                except psycopg.OperationalError as refused:
                    if any(words in str(refused) for words in FULL):
                        return True
                    error = refused
            if not self._serves(pid):
                return False
            if isinstance(error, pg.ConnectionTimeout) or time.monotonic() > end:
                raise ConfigurationError(
                    f"the PostgreSQL in {self.root} (process {pid}) does not answer; end that process, "
                    f"and look into {self.log}"
                ) from error
            time.sleep(LOOK)
        return False

    def _binaries(self) -> Binaries:
        """Programs that fit the data, and that the account which runs them can reach."""
        version_file = self._at.data / "PG_VERSION"
        made_by = int(version_file.read_text(encoding="utf-8")) if version_file.exists() else None
        binaries = find(made_by)
        if made_by is not None and binaries.major != made_by:
            raise ConfigurationError(
                f"the data in {self._at.data} was made by PostgreSQL {made_by}, but {binaries.source} is "
                f"{binaries.version}: set DURABLE_PG_BIN to the programs of a PostgreSQL {made_by} (to keep the data, "
                "pg_dumpall with it and load that into a new folder), or move the folder away to begin anew"
            )
        account = self._at.account
        if account.other and not usable_by(binaries.folder / "postgres", account.uid, account.gid):
            binaries = copy_for_all(binaries, _base_of_root())
        return binaries

    def _create(self, binaries: Binaries) -> None:
        """initdb beside the final place: what is killed halfway never looks like a database."""
        data, account = self._at.data, self._at.account
        for half in data.parent.glob("pg.new-*"):
            shutil.rmtree(half, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix="pg.new-", dir=data.parent))
        if account.other:
            os.chown(new, account.uid, account.gid)
        arguments = ["-D", str(new), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        self._run(binaries, "initdb", *arguments, *(["--no-sync"] if self.throw_away else []))
        new.rename(data)

    def _clear_leftovers(self) -> None:
        """No server serves this folder, but PostgreSQL refuses to start while the process of a lock file lives,
        whatever that is today."""
        (self._at.data / "postmaster.pid").unlink(missing_ok=True)
        for leftover in self._at.socket_folder.glob(f".s.PGSQL.{PORT}*"):
            leftover.unlink(missing_ok=True)

    def _launch(self, binaries: Binaries) -> None:
        at = self._at
        at.log.touch()
        if at.account.other:
            os.chown(at.log, at.account.uid, at.account.gid)
        settings = ["listen_addresses=", f"unix_socket_directories={at.socket_folder}", f"port={PORT}", *self.options]
        arguments = ["-D", str(at.data), "-l", str(at.log), "-w", "-t", str(int(LIMIT)), "start"]
        arguments += ["-o", " ".join("-c " + _shell_quoted(setting) for setting in settings)]
        end = time.monotonic() + LIMIT
        while True:
            already = at.log.stat().st_size
            try:
                self._run(binaries, "pg_ctl", *arguments)
            except ConfigurationError:
                if self._up():
                    return  # somebody who was killed meanwhile had started it just before
                # Children of a killed postmaster may take a moment to notice, and hold its shared memory until then.
                text = at.log.read_bytes()[already:]
                if b"shared memory block" not in text or time.monotonic() > end:
                    raise
                time.sleep(LOOK)
            else:
                return

    def _stop_server(self, mode: Literal["fast", "immediate"]) -> None:
        """By signal: `pg_ctl stop` waits in vain for one that is just being killed."""
        pid = self.pid
        if pid is None or not self._serves(pid):
            return
        if mode == "fast":
            # PostgreSQL 18 hangs if it is told to stop while it recovers from the crash of a backend: wait that out,
            # and be prepared for one that recovers just now. "Immediate" is safe too, it only costs a recovery.
            with suppress(ConfigurationError):
                self._up()
            _send(pid, signal.SIGINT)
            with suppress(ConfigurationError):
                _wait(lambda: not self._serves(pid), "its end", PATIENCE)
        if self._serves(pid):
            _send(pid, signal.SIGQUIT)
        _wait(lambda: not self._serves(pid), f"the end of process {pid}, the PostgreSQL in {self.root}")

    def _serves(self, pid: int) -> bool:
        return _is_postmaster_of(pid, self._at.data)

    def _discard(self) -> None:
        self._stop_server("immediate")
        shutil.rmtree(self._at.data, ignore_errors=True)

    def _run(self, binaries: Binaries, program: str, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        environment.update(LC_ALL="C", TZ="UTC")
        account = self._at.account
        # Into a file, not a pipe: the server inherits it, and a pipe would end only with the server.
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            ended = subprocess.run(
                [str(binaries.folder / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=environment,
                cwd="/",
                timeout=LIMIT * 2,  # pg_ctl has a limit of its own
                check=False,
                umask=0o077,
                user=account.uid if account.other else None,
                group=account.gid if account.other else None,
                extra_groups=[] if account.other else None,
            )
            if ended.returncode:
                said.seek(0)
                log = self.log.read_text(encoding="utf-8", errors="replace")[-2000:] if self.log.exists() else ""
                raise ConfigurationError(
                    f"{program} of {binaries.source} failed in {self.root}:\n{said.read().strip()}\n{log}".rstrip()
                )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the parts of one embedded server lie, and who runs it."""

    data: Path
    log: Path
    socket_folder: Path
    account: Account

    @classmethod
    def of(cls, root: Path) -> _Place:
        key = hashlib.sha256(os.fsencode(root)).hexdigest()[:10]
        account = _account(root)
        if account.other and not usable_by(root, account.uid, account.gid):
            root = _base_of_root() / key
            root.mkdir(exist_ok=True)
            root.chmod(0o755)
            account = _account(root)
        return cls(root / "pg", root / "pg.log", _socket_folder(f"durable-{account.uid}-{key}", account), account)

    def make_socket_folder(self) -> None:
        """Ours alone: whoever can reach the socket is the database's superuser."""
        folder, account = self.socket_folder, self.account
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (account.uid, os.geteuid()):
            raise ConfigurationError(f"{folder} belongs to somebody else; remove it, or set TMPDIR to another folder")
        if account.other:
            os.chown(folder, account.uid, account.gid)
        folder.chmod(0o700)


def _account(root: Path) -> Account:
    """Ourselves; for root the owner of the data that there is, else an account that exists on most machines."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid(), other=False)
    for known in _accounts(root):
        try:
            entry = pwd.getpwuid(known) if isinstance(known, int) else pwd.getpwnam(known)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(entry.pw_uid, entry.pw_gid, other=True)
    raise ConfigurationError(
        f"PostgreSQL refuses to run as root, and there is no account {' or '.join(ACCOUNTS)} to run it: "
        "add one, or run as an ordinary user, or set DURABLE_DATABASE_URL to a running server"
    )


def _accounts(root: Path) -> Iterator[str | int]:
    if (data := root / "pg").exists():
        yield data.stat().st_uid
    yield from ACCOUNTS


def _base_of_root() -> Path:
    base = ROOTS_BASE
    base.mkdir(exist_ok=True)
    base.chmod(0o755)
    return base


def _socket_folder(name: str, account: Account) -> Path:
    for temporary in dict.fromkeys((Path(tempfile.gettempdir()), Path("/tmp"))):  # noqa: S108 (made 0700, owner checked)
        folder = temporary / name
        fits = len(os.fsencode(folder / f".s.PGSQL.{PORT}")) <= SOCKET_PATH
        if fits and temporary.is_dir() and usable_by(temporary, account.uid, account.gid):
            return folder
    raise ConfigurationError(
        f"no temporary folder is short enough for a socket, and open to the account that runs PostgreSQL "
        f"(user id {account.uid}): set TMPDIR to one"
    )


@dataclass(frozen=True, slots=True)
class _PidFile:
    pid: int | None
    socket_folder: Path | None


def _pid_file(data: Path) -> _PidFile:
    """Line 1 of ``postmaster.pid`` is the process, line 5 the folder of its socket."""
    try:
        lines = (data / "postmaster.pid").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return _PidFile(int(lines[0]), Path(lines[4]) if len(lines) > 4 and lines[4] else None)
    except (OSError, ValueError, IndexError):
        return _PidFile(None, None)


def _is_postmaster_of(pid: int, data: Path) -> bool:
    """By its command line, which also says that it is no zombie: those have none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
        asked = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, check=False)  # noqa: S607
        return os.fsencode(data) in asked.stdout
    except OSError:
        return False
    return words[0].endswith(b"postgres") and os.fsencode(data) in words


def _try_lock(file: IO[str], *, shared: bool = False) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait(done: Callable[[], bool], what: str, limit: float | None = None) -> None:
    end = time.monotonic() + (limit or LIMIT)
    while not done():
        if time.monotonic() > end:
            raise ConfigurationError(f"waited {limit or LIMIT:.0f} s in vain for {what}")
        time.sleep(LOOK)


def _shell_quoted(text: str) -> str:
    """pg_ctl hands its ``-o`` to a shell."""
    return "'" + text.replace("'", "'\\''") + "'"
