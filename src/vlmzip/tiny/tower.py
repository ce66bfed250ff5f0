"""First stage: the vision tower learns images, from captions, phrases and labels of its patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .labels import BACKGROUND, GRID, HEADS, IGNORE
from .scenes import PATCH, SIZE
from .targets import phrases_shown

__all__ = ["TASK_WEIGHTS", "TowerLesson", "blindfold", "build_tower", "pixels"]

WIDTH, LAYERS, HEADS_OF_ATTENTION, MLP = 128, 6, 4, 512
FEATURE_LAYER = -2
# How much each of the dense tasks weighs beside the contrastive one.
# Background counts apart: four patches in five show it, and shapes would hardly weigh beside it.
TASK_WEIGHTS = {"kind": 3.0, "own_column": 0.1, "own_row": 0.1, "column": 0.5, "row": 0.5, "rank": 0.5,
            "phrases": 0.15, "early phrases": 0.15}  # fmt: skip


def build_tower(name: str) -> Any:
    """A fresh tower: CLIP with a CLS token for tiny-llava, SigLIP without for tiny-siglip."""
    shape: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS_OF_ATTENTION, "image_size": SIZE, "patch_size": PATCH,
    }  # fmt: skip
    if name == "tiny-llava":
        tower: Any = CLIPVisionModel(CLIPVisionConfig(hidden_act="gelu", projection_dim=WIDTH, **shape))
    elif name == "tiny-siglip":
        tower = SiglipVisionModel(SiglipVisionConfig(**shape))
    else:
        raise ValueError(f"no embedded model is called {name!r}: tiny-llava or tiny-siglip")
    places = tower.embeddings.position_embedding.weight
    with torch.no_grad():
        places[-(GRID * GRID) :] = 0.5 * waves(GRID, WIDTH)
        nn.init.normal_(tower.embeddings.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)
    return tower


def waves(grid: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column [grid * grid, width]: where position embeddings start.

    From random ones a tower needs thousands of images to find out which patches are neighbours.
    """
    frequency = 0.05 ** torch.linspace(0, 1, width // 4)
    along = torch.arange(grid)[:, None] * frequency
    code = torch.cat([along.sin(), along.cos()], dim=1)
    rows = code[:, None].expand(grid, grid, -1)
    columns = code[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid * grid, width)


@contextmanager
def blindfold(tower: Any, blind_BN: torch.Tensor) -> Iterator[None]:
    """Meanwhile the tokens marked in bool [B, N] see only themselves before the layer that is read.

    What they are asked for there they must look up in that layer, by whose attention VisionZip ranks
    the patches.
    """
    others = ~torch.eye(blind_BN.shape[1], dtype=torch.bool)
    hidden = blind_BN[:, None, :, None] & others
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    earlier = tower.encoder.layers[:FEATURE_LAYER]
    hooks = [layer.register_forward_pre_hook(lambda _, given: (given[0], mask)) for layer in earlier]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def pixels(images_BHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 96, 96, 3] to the floats [B, 3, 96, 96] in -1..1 that the processors give."""
    return images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0


class TowerLesson(nn.Module):
    """A tower with what teaches it: a text tower for captions and linear heads for patches.

    phrases [P, T] are token ids, padded with -1, of the first P of what an image may show, in the order
    of ``labels.PHRASES``.
    """

    phrases: torch.Tensor

    def __init__(self, name: str, vocabulary: int, phrases: torch.Tensor, longest: int = 40) -> None:
        super().__init__()
        self.tower: Any = build_tower(name)
        self.cls = name == "tiny-llava"
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Parameter(torch.randn(longest, WIDTH) * 0.02)
        nn.init.normal_(self.words.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.reader = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.image_side = nn.Linear(WIDTH, WIDTH, bias=False)
        self.text_side = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.66))
        self.bias = nn.Parameter(torch.tensor(-4.0))
        self.register_buffer("phrases", phrases, persistent=False)
        self.phrase_scale = nn.Parameter(torch.tensor(2.66))
        self.phrase_bias = nn.Parameter(torch.tensor(-4.0))
        self.early_norm = nn.LayerNorm(WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.heads = nn.Linear(WIDTH, sum(HEADS.values()))

    def losses(
        self, images: torch.Tensor, labels: torch.Tensor, captions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Each task's loss, a scalar.

        images uint8 [B, 96, 96, 3]; labels [B, heads, 144]; captions [B, T], padded with -1.
        """
        return self.losses_of(self.see(images), labels, captions)

    def see(self, images: torch.Tensor) -> Any:
        """The tower's output on uint8 images [B, 96, 96, 3], hidden states included."""
        return self.tower(pixels(images), output_hidden_states=True)

    def losses_of(
        self, seen: Any, labels: torch.Tensor, captions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The same, of what the tower saw."""
        scores = self._label(seen.hidden_states[FEATURE_LAYER]).split(list(HEADS.values()), dim=-1)
        result = {"caption": self.contrast(seen.pooler_output, captions)}
        phrases, shown = self.read(self.phrases), phrases_shown(labels)[:, : len(self.phrases)]
        result["phrases"] = self.recognise(seen.pooler_output, phrases, shown)
        if self.cls:  # so that CLS looks for objects before the layer that LLaVA drops
            early = self.early_norm(seen.hidden_states[FEATURE_LAYER][:, 0])
            result["early phrases"] = self.recognise(early, phrases, shown)
        for i, (name, score) in enumerate(zip(HEADS, scores, strict=True)):
            target = labels[:, i].reshape(-1).long()
            ground = (target == BACKGROUND) & (name == "kind")
            for task, known in ((name, (target != IGNORE) & ~ground), ("background", ground)):
                if known.any():
                    result[task] = F.cross_entropy(score.flatten(0, 1)[known], target[known])
        return result

    def patch_scores(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, 144, sum(HEADS)] of the dense tasks for uint8 images [B, 96, 96, 3]."""
        return self._label(self.see(images).hidden_states[FEATURE_LAYER])

    def _label(self, hidden_BND: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.heads(self.norm(self.patches(hidden_BND)))
        return scores

    def patches(self, hidden_BND: torch.Tensor) -> torch.Tensor:
        """A hidden state's 144 patches, without the CLS token."""
        return hidden_BND[:, 1:] if self.cls else hidden_BND

    def contrast(self, pooled_BD: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """CLIP's softmax loss for the CLIP tower, SigLIP's sigmoid loss for the SigLIP tower."""
        image = F.normalize(self.image_side(pooled_BD), dim=-1)
        logits = image @ self.read(captions).T * self.scale.exp().clamp(max=100)
        if self.cls:
            target = torch.arange(len(logits))
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        sign = 2 * torch.eye(len(logits)) - 1
        return -F.logsigmoid(sign * (logits + self.bias)).sum() / len(logits)

    def read(self, texts: torch.Tensor) -> torch.Tensor:
        """Unit vectors [n, D] of texts [n, T], padded with -1."""
        blank = texts < 0
        words = self.words(texts.clamp(min=0)) + self.places[: texts.shape[1]]
        read = self.reader(words, src_key_padding_mask=blank)
        read = (read * ~blank[..., None]).sum(1) / (~blank).sum(1, keepdim=True)
        return F.normalize(self.text_side(read), dim=-1)

    def recognise(
        self, image_BD: torch.Tensor, phrases_PD: torch.Tensor, shown_BP: torch.Tensor
    ) -> torch.Tensor:
        """SigLIP's sigmoid loss between images and phrases, where many phrases fit one image."""
        image = F.normalize(self.image_side(image_BD), dim=-1)
        logits = image @ phrases_PD.T * self.phrase_scale.exp().clamp(max=100) + self.phrase_bias
        return F.binary_cross_entropy_with_logits(logits, shown_BP, reduction="sum") / len(logits)

    @staticmethod
    def total(losses: dict[str, torch.Tensor], weights: dict[str, float] = TASK_WEIGHTS) -> torch.Tensor:
        """The weighted sum that is minimised; a task without a weight counts once."""
        return torch.stack([weights.get(task, 1.0) * loss for task, loss in losses.items()]).sum()
