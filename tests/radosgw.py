"""A command with a real S3 server: Ceph's gateway on one node, in a folder that goes with it.

    python -m tests.radosgw pytest -m s3
    python -m tests.radosgw rlhf-flows train quickstart store.url=s3://testing/runs

Needs Debian's packages radosgw, ceph-mon, ceph-osd and ceph-mgr, and root. One monitor, one object
store in memory, the gateway on loopback; the bucket `testing` is made. What it starts it ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["gateway"]

_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "radosgw")
_START_S = 120.0
_KEY, _SECRET = "testing", "testing123"
_CONFIGURATION = """\
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
keyring = {folder}/keyring
ms_bind_ipv6 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 2
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data = {folder}/mon
mon_data_avail_crit = 1
osd_data = {folder}/osd
run_dir = {folder}/run
log_file = {folder}/$name.log
admin_socket = {folder}/run/$name.asok
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_memory_target = 939524096
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_data = {folder}/run
"""
_CAPABILITIES = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *", "mgr", "allow *"),
    "client.rgw": ("mon", "allow *", "osd", "allow *"),
    "osd.0": ("mon", "allow *", "osd", "allow *"),
}


@contextmanager
def gateway() -> Iterator[dict[str, str]]:
    """The environment in which an S3 client finds the gateway, which ends with the block."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not found: install Ceph's server, on Debian\n"
            "  apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-mgr"
        )
    folder = Path(tempfile.mkdtemp(prefix="rlhf-flows-radosgw-"))
    port, mon_port = _free_port(), _free_port()
    try:
        _start(folder, port, mon_port)
        address = f"http://127.0.0.1:{port}"
        _wait_for(address, folder)
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        for file in (folder / "run").glob("*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, port: int, mon_port: int) -> None:
    for name in ("mon", "osd", "run"):
        (folder / name).mkdir()
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    text = _CONFIGURATION.format(fsid=fsid, folder=folder, port=port, mon_port=mon_port)
    (folder / "ceph.conf").write_text(text)
    keyring, monmap = str(folder / "keyring"), str(folder / "monmap")

    def run(*command: str) -> None:
        environment = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf")}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_START_S
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")

    for number, (who, capabilities) in enumerate(_CAPABILITIES.items()):
        caps = [
            word
            for i in range(0, len(capabilities), 2)
            for word in ("--cap", capabilities[i], capabilities[i + 1])
        ]
        create = ["-C"] if number == 0 else []
        run("ceph-authtool", *create, keyring, "--gen-key", "-n", who, *caps)
    here = f"[v2:127.0.0.1:{mon_port}]"
    run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", here, monmap)
    run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
    run("ceph-mon", "-i", "a", "--pid-file", f"{folder}/run/mon.pid")
    run("ceph", "osd", "new", osd)
    run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    run("ceph-osd", "-i", "0", "--pid-file", f"{folder}/run/osd.pid")
    user = ("--uid=test", "--display-name=test", f"--access-key={_KEY}", f"--secret-key={_SECRET}")
    run("radosgw-admin", "user", "create", *user)
    run("radosgw", "-n", "client.rgw", "--pid-file", f"{folder}/run/rgw.pid")


def _wait_for(address: str, folder: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    log = (folder / "client.rgw.log").read_text()[-2000:]
    raise SystemExit(f"the gateway at {address} did not answer within {_START_S:g} s: {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with gateway() as environment:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=_KEY,
            aws_secret_access_key=_SECRET,
            region_name=environment["AWS_DEFAULT_REGION"],
        )
        client.create_bucket(Bucket="testing")
        return subprocess.run(sys.argv[1:], env={**os.environ, **environment}).returncode


if __name__ == "__main__":
    sys.exit(main())
