"""A server as a child process: started, waited for, ended."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START = 1800.0  # seconds that a server may take to start
END = 60.0  # seconds that it may take to end when asked to


class Server:
    """A server of the OpenAI API; a context manager that ends with its whole process group.

    Args:
        command: The words of the command, ``--port`` left out.
        log: The file that takes its output.
        environment: Variables beside this process's own.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self.log = log
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _wait(self) -> None:
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                code = self.process.returncode
                raise RuntimeError(f"the server ended with {code} before it was ready: {self._reason()}")
            if self._healthy():
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server was not ready after {START:.0f} s; its log: {self.log}")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _reason(self) -> str:
        """The last line of the log that names an error, which is seldom the last line."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return f"{(errors or lines or ['no output'])[-1].strip()} (log: {self.log})"

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END)
        # Engine and workers are processes of their own, and may outlive the front end.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
