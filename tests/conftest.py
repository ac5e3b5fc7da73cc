"""What all tests share: our package first on the path, one local Ray, GPU tests only with a GPU."""

import os
from collections.abc import Iterator

import _bootstrap
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of tiny models wait for each other longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_bootstrap.adopt()


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of our own in this session, with more logical CPUs than the machine may have; its
    workers may use the S3 server of the tests."""
    import ray

    from tests.job.store import CREDENTIALS
    from trio.job.nodes.environment import FEW_CPUS, export_path

    export_path()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (CREDENTIALS | FEW_CPUS).items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
