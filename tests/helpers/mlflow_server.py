"""A real `mlflow server` on the loopback address, and a PostgreSQL for it to keep its runs in."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.gloo import free_port


class MlflowServer:
    """A running server; use as a context manager, or kill it.

    Args:
        folder: where it runs; its sqlite and artifacts lie here if `options` do not say otherwise.
        options: of `mlflow server`.
        port: to listen on.
        env: added to the environment.
    """

    def __init__(self, folder: Path, *options: str, port: int | None = None, **env: str) -> None:
        self.port = port or free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        given = {option for option in options if option.startswith("--")}
        defaults = {
            "--workers": "1",
            "--backend-store-uri": f"sqlite:///{folder / 'server.db'}",
            "--artifacts-destination": str(folder / "artifacts"),
        }
        for name, value in defaults.items():
            command += [] if name in given else [name, value]
        self._command, self._folder = [*command, *options], folder
        self._environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **env}
        self.start()

    def start(self) -> None:
        """Start it, also again after it was killed."""
        log = self._folder / f"server-{self.port}.log"
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                start_new_session=True,
            )
        try:
            self._wait(log)
        except BaseException:
            self.kill()
            raise

    def _wait(self, log: Path) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"mlflow server does not start:\n{log.read_text()[-4000:]}") from None
                time.sleep(0.2)

    def kill(self) -> None:
        """End it, and all of its processes, in the middle of whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "MlflowServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The address of a new database of a PostgreSQL of its own; skips the test where there is none."""
    missing = [program for program in ("postgres", "initdb") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    user, port = _unprivileged(), free_port()
    data = folder / "postgres"
    data.mkdir()
    if user:
        for above in (data, *data.parents):
            if above.stat().st_uid == os.getuid() and not above.stat().st_mode & 0o001:
                above.chmod(above.stat().st_mode | 0o011)
        shutil.chown(data, *user)
    as_user = ["setpriv", f"--reuid={user[0]}", f"--regid={user[1]}", "--clear-groups"] if user else []
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*as_user, "initdb", "-D", str(data), "-U", "mlflow", "--auth=trust", "--no-sync"], **quiet)
    command = ["postgres", "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"]
    server = subprocess.Popen(
        [*as_user, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True
    )
    try:
        yield _database(port, server)
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(30)


def _unprivileged() -> tuple[str, str] | None:
    """PostgreSQL refuses to run as root: somebody else, if that is who we are."""
    return ("nobody", "nogroup") if os.getuid() == 0 else None


def _database(port: int, server: subprocess.Popen) -> str:
    import psycopg2

    deadline = time.monotonic() + 60
    while True:
        try:
            connection = psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", dbname="postgres")
            break
        except psycopg2.OperationalError:
            assert server.poll() is None and time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.2)
    connection.autocommit = True
    connection.cursor().execute("CREATE DATABASE mlflow")
    connection.close()
    return f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"


def points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric, asked of the server's REST interface, page by page."""
    import json
    from urllib.parse import urlencode

    found, token = [], ""
    while True:
        query = urlencode({"run_id": run_id, "metric_key": key, "max_results": 1000, "page_token": token})
        with urllib.request.urlopen(f"{uri}/api/2.0/mlflow/metrics/get-history?{query}", timeout=30) as answer:
            page = json.load(answer)
        found += [(int(point.get("step", 0)), float(point["value"])) for point in page.get("metrics", [])]
        token = page.get("next_page_token", "")
        if not token:
            return found
