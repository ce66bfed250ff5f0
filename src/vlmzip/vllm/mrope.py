"""Multimodal rotary positions in vLLM: kept tokens stay where they stood in the uncompressed prompt.

vLLM asks for a prompt's positions before its images are encoded, when it is known how many tokens an
image keeps but not which. The stock model is asked about the uncompressed prompt, so the text is where
it belongs, whatever will be kept: positions of text never change, in no cache and in no later turn. An
image's tokens all get its first token's position at first. Their rows and columns come with their
embeddings, as trailing channels, and are added when vLLM hands these to the language model.
Shapes: K kept tokens of an image, T tokens of the prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_multimodal_pruning
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

logger = init_logger(__name__)

# Channels have the embeddings' dtype, and bfloat16 holds whole numbers up to 256 only: so a row and a
# column are two digits each.
_BASE = 128
_CHANNELS = 4


def with_places(tokens_KD: Tensor, index_K: Tensor, columns: int) -> Tensor:
    """Append to each kept token of an image where it stands: [K, D + channels].

    Args:
        tokens_KD: The tokens.
        index_K: Each one's place among the image's tokens, row by row.
        columns: Tokens in a row of the image.
    """
    row_K, column_K = index_K // columns, index_K % columns
    digits = [row_K // _BASE, row_K % _BASE, column_K // _BASE, column_K % _BASE]
    return torch.cat([tokens_KD, torch.stack(digits, 1).to(tokens_KD.dtype)], 1)


def split_places(rows: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Take :func:`with_places` apart: the tokens of each, and rows and columns [2, all tokens] int64."""
    digits = torch.cat([part[:, -_CHANNELS:] for part in rows]).long().T
    return [part[:, :-_CHANNELS] for part in rows], digits[::2] * _BASE + digits[1::2]


class CompressedMrope:
    """Before a stock M-RoPE model whose images have ``image_grid_thw``; positions of its prompts.

    A model that compresses sets ``supports_multimodal_pruning``; vLLM then calls
    :meth:`recompute_mrope_positions`.
    """

    compression: Any
    config: Any
    language_model: Any
    model_config: Any

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Positions [3, T] of a prompt, and the position after it less T."""
        stock: Any = super().get_mrope_input_positions  # type: ignore[misc]
        if self.compression is None:
            plain: tuple[Tensor, int] = stock(input_tokens, mm_features)
            return plain
        merged = self.compression.family.tower.merge**2
        columns: list[int] = []  # where each token stands in the uncompressed prompt
        features, dropped = [], 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            here = feature.mm_position
            start = here.offset + dropped
            columns += range(len(columns) + dropped, start)
            columns += [start] * here.length
            whole = int(feature.data["image_grid_thw"].data.prod()) // merged
            features.append(replace(feature, mm_position=replace(here, offset=start, length=whole)))
            dropped += whole - here.length
        columns += range(len(columns) + dropped, len(input_tokens) + dropped)
        source = [0] * (len(input_tokens) + dropped)  # the stock method looks at its length only
        positions_3F, _ = stock(source, features)
        positions_3T = self._within_table(positions_3F[:, columns])
        return positions_3T, _delta(positions_3T)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Give the image tokens of one step their rows and columns; may be repeated.

        Args:
            input_ids: The whole prompt.
            multimodal_embeddings: The embeddings of this step's image tokens, with channels.
            mrope_positions: [3, T].
            num_computed_tokens: Tokens of the prompt before this step.

        Returns:
            The embeddings without channels, the positions, and the position after the prompt less T.
        """
        tokens: Sequence[Tensor] = multimodal_embeddings
        if tokens:
            with gpu_sync_allowed():
                tokens, places_2S = split_places(multimodal_embeddings)
                places_2S = places_2S.to(mrope_positions.device)
                ids_T = torch.as_tensor(input_ids, device=mrope_positions.device)
                image_S = (ids_T[num_computed_tokens:] == self.config.image_token_id).nonzero()[:, 0]
                image_S = image_S[: places_2S.shape[1]] + num_computed_tokens
                mrope_positions = mrope_positions.clone()
                mrope_positions[1:, image_S] = mrope_positions[0, image_S] + places_2S
                mrope_positions = self._within_table(mrope_positions)
        return tokens, mrope_positions, _delta(mrope_positions)

    def _within_table(self, positions_3T: Tensor) -> Tensor:
        """Keep positions in vLLM's table of them, four times as many as the model was trained for.

        Without compression vLLM's own limit of a prompt's length does that. A compressed prompt may hold
        so many images that its positions pass the table's end, where vLLM would crash with every
        request that it serves.
        """
        rotary = self.language_model.model.layers[0].self_attn.rotary_emb
        answer = self.model_config.max_model_len - positions_3T.shape[1]
        last = rotary.cos_sin_cache.shape[0] - 1 - answer
        if int(positions_3T.max()) > last:
            logger.warning(
                "a prompt's images are so many or so large that its positions pass %d, the end of what "
                "vLLM has of them; later tokens share that position. Send fewer or smaller images.",
                last,
            )
        return positions_3T.clamp(max=last)


def _delta(positions_3T: Tensor) -> int:
    """The position after a prompt less its tokens: it ends with text, which comes after every image."""
    return int(positions_3T[0, -1]) + 1 - positions_3T.shape[1]


def let_cpu_runner_ask() -> None:
    """Make vLLM's CPU runner ask the model whether it prunes, as its GPU runner does.

    The CPU runner loads models by a method of its own, which leaves the answer at no.
    """
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def asked(runner: Any) -> bool:
        config = runner.model_config.multimodal_config
        pruning = config is not None and config.is_multimodal_pruning_enabled()
        return pruning and supports_multimodal_pruning(runner.get_model())

    def ignore(runner: Any, value: bool) -> None:
        """The runner's own attribute, set before there is a model."""

    CPUModelRunner.is_multimodal_pruning_enabled = property(asked, ignore)
