"""The embedded models' shapes with random weights: what they answer is known to be wrong."""

from pathlib import Path

import pytest
import torch

from vlmzip.tiny.checkpoint import build_model, build_processor, save_checkpoint
from vlmzip.tiny.language import build_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of both embedded models' shapes, with random weights."""
    where = tmp_path_factory.mktemp("evaluation")
    tokenizer = build_tokenizer()
    for name in ("tiny-llava", "tiny-siglip"):
        torch.manual_seed(1)
        model = build_model(name, tokenizer)
        with torch.no_grad():  # as they are built, untrained ones repeat the last word whatever they see
            model.get_input_embeddings().weight.mul_(0.02)
            model.model.language_model.norm.weight.fill_(1.0)
        save_checkpoint(model, build_processor(name, tokenizer), where / name)
    return where
