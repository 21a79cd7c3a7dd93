"""What holds for every test: no network, no hub, one thread, a cache of the session's own."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]
LOCAL_HOSTS = ("127.", "::1", "localhost", "0.0.0.0")

# Read when the libraries are imported, so set before any test module is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
)
for launched in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(launched, None)


class NetworkUsed(RuntimeError):
    """A test tried to leave this machine."""


_connect = socket.socket.connect


def _connect_locally(self: socket.socket, address: Any) -> None:
    if self.family != socket.AF_UNIX and not str(address[0]).startswith(LOCAL_HOSTS):
        raise NetworkUsed(f"no test may use the network; this one wanted {address}")
    _connect(self, address)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Any:
    """Sockets reach this machine only."""
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", _connect_locally)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tokenised rows of one session are not the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    folder = Path(os.environ.get("ALIGN_REAL_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; name a folder in ALIGN_REAL_DATA")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
