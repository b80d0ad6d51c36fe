import beartype  # noqa: F401, I001  before anything that imports nnsight, which adds methods to `object`

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CIRCUITKIT_CACHE"] = "off"  # what was found in one run must not be believed in the next
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "2")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; what is set here was set by the one that started them
    os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

# Rooms whose annotations are held to be true, shapes included: with CIRCUITKIT_CHECKED=1 the calls in the tests check them, as .ci/run does
# for the files that hold. Before anything imports these rooms.
CHECKED = ("core", "engine", "featurizers", "methods", "metrics", "models", "patchers")
if os.environ.get("CIRCUITKIT_CHECKED") == "1":
    jaxtyping.install_import_hook([f"circuitkit.{room}" for room in CHECKED], "annotations_for_tests.checked")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session", autouse=True)
def _wandb_folders(tmp_path_factory):
    """W&B keeps its files out of the checkout and out of the home folder."""
    folder = tmp_path_factory.mktemp("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[name] = str(folder)


@pytest.fixture(autouse=True)
def _fresh_state():
    """No test sees the seed, the Hydra or the environment of another."""
    torch.manual_seed(0)
    environment = dict(os.environ)
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    os.environ.clear()
    os.environ.update(environment)
