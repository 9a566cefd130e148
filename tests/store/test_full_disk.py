"""A disk that is really full: a small file system of its own, in a namespace of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
IN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
MOUNT = 'mount -t tmpfs -o size=4m none "$1" && shift && exec "$@"'

PROLOGUE = """
import os, sys, threading
from pathlib import Path
from rlhf_flows.errors import StoreUnavailableError
from rlhf_flows.store import commit_json, open_store
disk, elsewhere = Path(sys.argv[1]), Path(sys.argv[2])
assert os.statvfs(disk).f_blocks * os.statvfs(disk).f_frsize == 4 << 20
store = open_store(disk / "store", retry_budget_s=0.3)
store.put_if_absent("run/there", b"whole")
(elsewhere / "model").write_bytes(os.urandom(1 << 20))
(disk / "filler").write_bytes(bytes(3_500_000))

def files():
    found = (path for path in store.root.rglob("*") if path.is_file())
    return sorted(path.relative_to(store.root).as_posix() for path in found)

def fails(call):
    try:
        call()
    except StoreUnavailableError as error:
        assert "the disk is full" in str(error) and "Given up after " in str(error), error
    else:
        raise AssertionError("there was room")
"""


def on_a_small_disk(tmp_path: Path, code: str) -> None:
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()
    elsewhere.mkdir()
    python = (sys.executable, "-c", PROLOGUE + code, str(disk), str(elsewhere))
    try:
        subprocess.run((*IN_NAMESPACE, "true"), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs unshare(1) and user namespaces: {error}")
    done = subprocess.run(
        (*IN_NAMESPACE, "sh", "-c", MOUNT, "sh", str(disk), *python),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_nothing_half_written_is_left(tmp_path):
    on_a_small_disk(
        tmp_path,
        """
fails(lambda: store.put_if_absent("run/shard", os.urandom(1 << 20)))
fails(lambda: store.put_folder(elsewhere, "run/weights/uid"))
assert files() == ["run/there"], files()
assert [info.key for info in store.list()] == ["run/there"]
""",
    )


def test_it_goes_on_once_there_is_room(tmp_path):
    on_a_small_disk(
        tmp_path,
        """
store.patience.budget_s = 30
threading.Timer(1.0, (disk / "filler").unlink).start()
data = os.urandom(1 << 20)
assert store.put_if_absent("run/shard", data)
assert store.get("run/shard") == data
assert files() == ["run/shard", "run/there"]

(disk / "filler").write_bytes(bytes(2_400_000))
threading.Timer(1.0, (disk / "filler").unlink).start()
records = store.put_folder(elsewhere, "run/weights/uid")
store.get_folder("run/weights/uid", records, elsewhere / "back")
assert (elsewhere / "back/model").read_bytes() == (elsewhere / "model").read_bytes()
assert files() == ["run/shard", "run/there", "run/weights/uid/model"]
""",
    )


def test_a_working_folder_waits_for_room_and_says_that_a_retry_will_do(tmp_path):
    on_a_small_disk(
        tmp_path,
        """
import rlhf_flows.store.working as working
working._MARGIN_BYTES = 1 << 20

def export():
    import torch
    from safetensors.torch import save_file
    with store.working_folder() as folder:
        (folder / "weights").mkdir()
        save_file({"w": torch.zeros(256, 1024)}, folder / "weights" / "model.safetensors")
        return store.put_folder(folder / "weights", "run/weights/uid")

fails(export)
assert files() == ["run/there"], files()

store.patience.budget_s = 30
threading.Timer(1.0, (disk / "filler").unlink).start()
try:
    export()
except StoreUnavailableError as error:
    assert "there is some now" in str(error), error
else:
    raise AssertionError("there was room")
assert [record.name for record in export()] == ["model.safetensors"]
assert files() == ["run/there", "run/weights/uid/model.safetensors"]
""",
    )


@pytest.mark.parametrize("part_bytes", [1 << 24, 1 << 18], ids=["whole", "in parts"])
def test_what_is_fetched_from_s3_waits_for_room_as_well(tmp_path, bucket, part_bytes):
    on_a_small_disk(
        tmp_path,
        f"""
import rlhf_flows.store.s3 as s3
remote = open_store("s3://{bucket}/{part_bytes}", retry_budget_s=0.3)
records = remote.put_folder(elsewhere, "uid")
s3._PART_BYTES = {part_bytes}
fails(lambda: remote.get_folder("uid", records, disk / "back"))
assert not list((disk / "back").iterdir())

remote.patience.budget_s = 30
threading.Timer(1.0, (disk / "filler").unlink).start()
remote.get_folder("uid", records, disk / "back")
assert (disk / "back/model").read_bytes() == (elsewhere / "model").read_bytes()
""",
    )
