"""One thread, no network, quiet libraries, and a torchvision that imports where it is installed."""

import importlib
import importlib.util
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# torchvision's compiled operators fit one build of torch only; its Python part, which the processors
# use, then fails to import for want of two operator schemas.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _import_torchvision() -> torch.library.Library | None:
    """Import torchvision if it is installed; returns the stand-in operators that this took."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        importlib.import_module("torchvision")
        return library
    return None


_stand_in = _import_torchvision()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs_torchvision: the processor has a part that transformers builds on torchvision"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "torchvision" in sys.modules:
        return
    skip = pytest.mark.skip(reason="torchvision is not installed; the processor needs it for videos")
    for item in items:
        if item.get_closest_marker("needs_torchvision"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
