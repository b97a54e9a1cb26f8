"""The `imaml` command in a process of its own, and the certainty that nothing of it is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner

from pipelines.cli import app

ROOT = Path(__file__).parents[2]


class Command:
    """A running `imaml ...`; use as a context manager, which ends it and waits for all of its processes to be gone.

    Args:
        inside: a command that becomes this one, somewhere else (`helpers.netns`).
    """

    def __init__(self, *args: str, cwd: Path, inside: Sequence[str] = (), **env: str) -> None:
        self.mark = uuid.uuid4().hex
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_", "IMAML_"))}
        clean["IMAML_KERNELS"] = os.environ["IMAML_KERNELS"]  # another home would have them compiled again
        environment = {**clean, "IMAML_TEST_MARK": self.mark, "PYTHONPATH": str(ROOT), **env}
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-m", "pipelines.cli", *args],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Tests may run in the background, where a shell has Ctrl-C ignored by all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.output = ""

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait(30)
        # Two of Ray's agents try for 60 s to report the end of a killed cluster to that cluster; then they end, too.
        deadline = time.monotonic() + 150
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        described = [_described(pid) for pid in left]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"processes were left behind: {described}"

    def wait(self, timeout: float = 240) -> int:
        """Exit code, after reading all output."""
        if self.process.returncode is not None and self.output:
            return self.process.returncode
        try:
            self.output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, _ = self.process.communicate()
            raise AssertionError(f"no end within {timeout} s; output so far:\n{out}") from None
        return self.process.returncode

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def processes(self) -> list[int]:
        """Living processes that inherited this command's mark."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environ, state = (
                        (entry / "environ").read_bytes(),
                        (entry / "stat").read_text().rpartition(")")[2].split()[0],
                    )
                except OSError:
                    continue
                if self.mark.encode() in environ and state != "Z":
                    found.append(int(entry.name))
        return found


def _described(pid: int) -> str:
    """What a process is and where it waits, for the message of a failure."""
    parts = [str(pid)]
    for name in ("cmdline", "wchan", "stat"):
        try:
            parts.append((Path("/proc") / str(pid) / name).read_text().replace("\0", " ").strip()[:200])
        except OSError:
            parts.append("-")
    return " | ".join(parts)


def imaml(*args: str, cwd: Path, timeout: float = 240, **env: str) -> tuple[int, str]:
    """Run `imaml ...` to its end: (exit code, output)."""
    with Command(*args, cwd=cwd, **env) as command:
        code = command.wait(timeout)
    return code, command.output


def imaml_here(*args: str, cwd: Path) -> tuple[int, str]:
    """As `imaml`, but in this process, which spares small runs the seconds that imports take."""
    found = sys.path[:]  # training adds the working directory, where a user's own model may lie
    known = set(sys.modules)
    try:
        with contextlib.chdir(cwd):
            result = CliRunner().invoke(app, args)
    finally:
        sys.path[:] = found
        for name in set(sys.modules) - known:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == Path(cwd):
                del sys.modules[name]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def wait_for_step(metrics: Path, step: int, command: Command, timeout: float = 120) -> None:
    """Wait until a run has recorded a meta-step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") > step:
            return
        assert command.process.poll() is None, f"ended before step {step}:\n{command.wait()}\n{command.output}"
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within {timeout} s")
