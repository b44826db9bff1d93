"""`hexswarm` out of a process that has imported everything: the same command, seconds earlier.

Importing torch, hivemind and a tokenizer takes three to six seconds of CPU, the commands of these
tests mostly a tenth of that and the nodes a quarter until they serve, and there are some sixty of
either. So one process imports and does nothing else; for each call it forks, and the child runs
`hexswarm.cli.main` with the words, environment, folder and files of its caller. A child is a whole
process: with its own event loop, libp2p daemon and exit status; only at its end it does not take
apart what was imported, which would copy all that memory. Imports start no thread. That commands
and nodes also work cold is held by the two machines of the README (`test_two_machines.py`), by
`hexswarm demo`, and by the commands that get a signal or a terminal of their own.

Each child has an attendant, which is the one to wait for it, tells its status, and ends it if the
caller is gone: nothing outlives a test run that was killed.

    python -P warm.py DOOR       listens on that file; ends when its standard input does
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import hexswarm.cli

MOST_BYTES = 1 << 17
IMPORTED_S = 100.0
"""Until the process has imported everything, on a busy machine."""


class Warm:
    """The process, as its caller sees it; starts when first used."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm")
        self._path = str(Path(self._folder.name) / "door")
        # The door exists before the process does: who calls too early waits in front of it.
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.bind(self._path)
        self._door.listen(16)
        command = [sys.executable, "-P", __file__, str(self._door.fileno())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=dict(environment),
            pass_fds=[self._door.fileno()],
        )

    def run(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        stdin: str = "",
        timeout_s: float = 100,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with captured output. Raises TimeoutExpired."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
            given, *said = files
            given.write(stdin)
            given.seek(0)
            caller = stack.enter_context(self._call(words, environment, files, cwd))
            status = Forked(words, caller).wait(timeout_s)
            return subprocess.CompletedProcess(list(words), status, *map(_text, said))

    def start(
        self, words: Sequence[str], environment: Mapping[str, str], errors: IO[bytes]
    ) -> Forked:
        """As `subprocess.Popen` with a pipe for what it says."""
        here, there = os.pipe()
        with open(os.devnull, "rb") as nothing, open(there, "wb") as out:
            caller = self._call(words, environment, (nothing, out, errors))
        return Forked(words, caller, open(here, "rb", buffering=0))

    def _call(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        files: Sequence[IO[Any]],
        cwd: Path | None = None,
    ) -> socket.socket:
        """Ask for a child with these files as its standard ones."""
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        caller.settimeout(IMPORTED_S)
        caller.connect(self._path)
        request = json.dumps([list(words), dict(environment), str(cwd or Path.cwd())]).encode()
        socket.send_fds(caller, [request], [file.fileno() for file in files])
        return caller

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._door.close()
        self._folder.cleanup()


class Forked:
    """A child, with those methods of `subprocess.Popen` that swarms need."""

    def __init__(
        self, words: Sequence[str], caller: socket.socket, stdout: io.FileIO | None = None
    ) -> None:
        self.args = list(words)
        self.stdout = stdout
        self.returncode: int | None = None
        self._caller = caller
        self.pid = int(caller.recv(64))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._caller.settimeout(timeout)
            try:
                self.returncode = int(self._caller.recv(64))
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from error
            self._caller.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


# --- the process -------------------------------------------------------------------------------


def _serve(door: socket.socket) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for attendants
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends the rest
    while True:
        ready, _, _ = select.select([door, 0], [], [])
        if 0 in ready:
            return 0
        caller, _ = door.accept()
        if os.fork() == 0:
            door.close()
            _attend(caller)
        caller.close()


def _attend(caller: socket.socket) -> NoReturn:
    """Run one command and tell how it ended; end it if nobody wants to know."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, files, _, _ = socket.recv_fds(caller, MOST_BYTES, 3)
    words, environment, cwd = json.loads(data)
    child = os.fork()
    if child == 0:
        caller.close()
        os.chdir(cwd)
        _command(words, environment, files)
    for file in files:  # who reads must see the end of the child's output
        os.close(file)
    with contextlib.suppress(BrokenPipeError):  # the caller has gone
        caller.send(str(child).encode())
        ready, _, _ = select.select([os.pidfd_open(child), caller], [], [])
        if caller in ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        caller.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _command(words: list[str], environment: dict[str, str], files: list[int]) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["hexswarm", *words]
    status = 1
    try:
        status = hexswarm.cli.main(words)
    except SystemExit as error:  # --help and --version
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # the pools of concurrent.futures end, and all but daemons are joined
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _import() -> None:
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    import hexswarm.ask
    import hexswarm.bootstrap.cli
    import hexswarm.client
    import hexswarm.peer.cli
    import hexswarm.peer.daemon
    import hexswarm.tokenizer  # noqa: F401
    from hexswarm.transports.libp2p import load_hivemind

    load_hivemind()
    # transformers loads its parts when they are asked for.
    AutoConfig.for_model("llama")
    assert AutoTokenizer
    assert PreTrainedTokenizerFast
    gc.freeze()  # what is never looked at is never copied


if __name__ == "__main__":
    entrance = socket.socket(fileno=int(sys.argv[1]))
    _import()
    sys.exit(_serve(entrance))
