"""`hexswarm` out of a process that has imported everything: the same command, seconds earlier.

Importing torch, hivemind and a tokenizer takes three to six seconds of CPU, the commands of these
tests mostly a tenth of that, and there are some sixty of them. So one process imports and does
nothing else; for each call it forks, and the child runs `hexswarm.cli.main` with the words, the
environment and the files of its caller. A child is a whole process: with its own event loop,
libp2p daemon and exit status; only at its end it does not take apart what was imported, which
would copy all that memory. Imports start no thread. That the command also works cold is held by
the tests of the README, and by every peer of every swarm.

    python -P warm.py DOOR       listens on that file; ends when its standard input does
"""

from __future__ import annotations

import atexit
import contextlib
import gc
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
from typing import IO, NoReturn

import hexswarm.cli

MOST_BYTES = 1 << 17


class Warm:
    """The process, as its caller sees it; starts when first used."""

    def __init__(self) -> None:
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
            pass_fds=[self._door.fileno()],
        )

    def run(
        self, words: Sequence[str], stdin: str, environment: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with captured output. Raises TimeoutExpired."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
            given, *said = files
            given.write(stdin)
            given.seek(0)
            caller = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            caller.settimeout(timeout_s)
            caller.connect(self._path)
            request = json.dumps([list(words), dict(environment)]).encode()
            socket.send_fds(caller, [request], [file.fileno() for file in files])
            status = self._status(caller, words, timeout_s)
            return subprocess.CompletedProcess(list(words), status, *map(_text, said))

    def _status(self, caller: socket.socket, words: Sequence[str], timeout_s: float) -> int:
        child = 0
        try:
            child = int(caller.recv(64))
            return int(caller.recv(64))
        except TimeoutError as error:
            if child:
                os.kill(child, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(words), timeout_s) from error

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._door.close()
        self._folder.cleanup()


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


# --- the process -------------------------------------------------------------------------------


def _serve(door: socket.socket) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for a command
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
    """Run one command and tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, files, _, _ = socket.recv_fds(caller, MOST_BYTES, 3)
    words, environment = json.loads(data)
    child = os.fork()
    if child == 0:
        caller.close()
        _command(words, environment, files)
    caller.send(str(child).encode())
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):  # the caller had enough of waiting
        caller.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _command(words: list[str], environment: dict[str, str], files: list[int]) -> NoReturn:
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
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _import() -> None:
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    import hexswarm.ask
    import hexswarm.client
    import hexswarm.peer.cli
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
