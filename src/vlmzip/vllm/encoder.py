"""The worker's side: run a CLIP- or SigLIP-like tower, read one layer's attention, compress.

Shapes: V views (images or crops), N tokens of a view, K kept ones, D hidden size, d head dimension.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather

from vlmzip.anyres import slice_views
from vlmzip.errors import UnsupportedModelError
from vlmzip.merging import ZipOutput
from vlmzip.vllm.settings import Compression


def views_per_forward(vllm_config: VllmConfig, n: int) -> int | None:
    """Views that are encoded at a time; None: all.

    vLLM sizes an encoder step by the tokens that come out of it, which compression makes few: 32
    images of 64 tokens where 3 uncompressed ones went. As many go at a time as would without, so the
    encoder needs no more memory. Adapters in the tower are told the rows of the whole step, so then it
    must run as one forward.
    """
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        return None
    batched: int = vllm_config.scheduler_config.max_num_batched_tokens
    return max(1, batched // n)


class ViewEncoder:
    """A tower and its compression.

    Args:
        run: The tower: pixels [V, C, H, W] -> hidden states [V, N, D], CLS included.
        attention: The attention layer that is read (``attn``, ``scale``, ``num_heads_per_partition``,
            ``tp_size``).
        compression: What the model's settings say; the family has a ``tower``.
        at_a_time: Views that are encoded at a time; None: all.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        attention: Any,
        compression: Compression,
        at_a_time: int | None,
    ) -> None:
        self.compression = compression
        self.state = compression.family.attachment(compression.method)
        self.at_a_time = at_a_time
        self._run = run
        self._attention = attention
        self._attention.attn.register_forward_pre_hook(self._read)

    @classmethod
    def of_tower(
        cls, tower: nn.Module, compression: Compression, vllm_config: VllmConfig, **options: Any
    ) -> "ViewEncoder":
        """For vLLM's ``CLIPVisionModel`` or ``SiglipVisionModel``, built up to the layer that is read.

        Args:
            tower: The tower.
            compression: What the model's settings say.
            vllm_config: vLLM's config.
            options: More arguments for the tower's forward.

        Raises:
            UnsupportedModelError: It was built up to another layer.
        """
        spec: Any = compression.family
        layers: Any = tower.vision_model.encoder.layers  # type: ignore[union-attr]
        if len(layers) != spec.tower.block + 1:
            raise UnsupportedModelError(
                f"vLLM built {len(layers)} layers of the vision tower where {spec.tower.block + 1} were "
                "expected; this version of vLLM is not supported"
            )
        at_a_time = views_per_forward(vllm_config, spec.tower.tokens(send_cls=True))

        def run(pixels_VCHW: Tensor) -> Tensor:
            hidden: Tensor = tower(pixels_VCHW, feature_select_strategy="full", **options)
            return hidden

        return cls(run, layers[-1].self_attn, compression, at_a_time)

    def encode(self, pixels_VCHW: Tensor, views: Sequence[int], asked: Sequence[int]) -> list[ZipOutput]:
        """Encode and compress the views of some images.

        Args:
            pixels_VCHW: The views of all images, one image after the other.
            views: How many views each image has.
            asked: What each image's request asked for, or ``OWN_BUDGET``.

        Returns:
            One output an image, its leading axis over the image's views.

        Raises:
            ValueError: Views, pixels and budgets are not as many.
        """
        if sum(views) != len(pixels_VCHW) or len(views) != len(asked):
            raise ValueError(
                f"{len(pixels_VCHW)} views were given for images of {list(views)} views and "
                f"{len(asked)} budgets"
            )
        budgets = [budget for budget, count in zip(asked, views, strict=True) for _ in range(count)]
        step = self.at_a_time or max(1, len(budgets))
        outs: list[ZipOutput] = []
        for start in range(0, len(budgets), step):
            part = slice(start, start + step)
            outs += self._encode_some(pixels_VCHW[part], budgets[part])
        ends = accumulate(views)
        return [_stack(outs[end - count : end]) for end, count in zip(ends, views, strict=True)]

    def _encode_some(self, pixels_VCHW: Tensor, budgets: list[int]) -> list[ZipOutput]:
        """One forward of the tower; views with the same budget are compressed together."""
        with self.state.tap.listen() as reading:
            hidden_VND = self._run(pixels_VCHW)
            ((scores_VN, keys_VNd),) = reading.take()
        scores_VN, keys_VNd = gather_heads(scores_VN, keys_VNd, self._attention.tp_size)
        grid = self.state.family.tower.grid
        outs: dict[int, ZipOutput] = {}
        for budget in dict.fromkeys(budgets):
            rows = [row for row, other in enumerate(budgets) if other == budget]
            pick: Any = slice(None) if len(rows) == len(budgets) else rows
            method = self.compression.method_for(budget)
            out = self.state.zip_views(
                hidden_VND[pick], scores_VN[pick], keys_VNd[pick], grid, method=method
            )
            outs |= {row: slice_views(out, place, place + 1) for place, row in enumerate(rows)}
        return [outs[row] for row in range(len(budgets))]

    def _read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Pre-hook of the attention that is read: its queries and keys, [V, N, H * d] of this rank."""
        query, key = args[:2]
        heads = self._attention.num_heads_per_partition
        q_VHNd, k_VHNd = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))
        self.state.tap.note(q_VHNd, k_VHNd, self._attention.scale, None)


def gather_heads(scores_VN: Tensor, keys_VNd: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Scores and keys over the heads of all tensor-parallel ranks.

    Each rank has means over as many heads of its own, so the mean over all heads is the mean of these.
    They are gathered rather than reduced: every rank then adds the same numbers in the same order, gets
    the same bits, and keeps the same tokens.

    Args:
        scores_VN: This rank's scores, float32.
        keys_VNd: This rank's keys, float32.
        ranks: Ranks that the heads are spread over.
    """
    if ranks == 1:
        return scores_VN, keys_VNd
    own_1VNd = torch.cat([scores_VN.unsqueeze(-1), keys_VNd], -1).unsqueeze(0)
    mean_VNd = tensor_model_parallel_all_gather(own_1VNd.contiguous(), dim=0).mean(0)
    return mean_VNd[..., 0], mean_VNd[..., 1:]


def project(projector: nn.Module, outs: Sequence[ZipOutput]) -> list[Tensor]:
    """Run the kept tokens of all images through the projector at once: [V, K, D'] for each image."""
    flat_TD = torch.cat([out.tokens.flatten(0, 1) for out in outs])
    shapes = [out.tokens.shape[:2] for out in outs]
    parts = projector(flat_TD).split([v * k for v, k in shapes])
    return [part.view(v, k, -1) for part, (v, k) in zip(parts, shapes, strict=True)]


def _stack(views: list[ZipOutput]) -> ZipOutput:
    if len(views) == 1:
        return views[0]
    return ZipOutput(
        tokens=torch.cat([view.tokens for view in views]),
        dominant=torch.cat([view.dominant for view in views]),
        contextual=torch.cat([view.contextual for view in views]),
        assignment=torch.cat([view.assignment for view in views]),
    )
