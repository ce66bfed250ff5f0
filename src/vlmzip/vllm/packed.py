"""Qwen's kind of model in vLLM: a tower that packs images of any size and merges their patches.

Shapes: P patches, M merged tokens of some images, K kept ones of an image, D hidden size, d head
dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.model_executor.models.vision import run_dp_sharded_mrope_vision_model

from vlmzip.errors import UnsupportedModelError
from vlmzip.patch_merger import places
from vlmzip.vllm.encoder import gather_heads
from vlmzip.vllm.mrope import CompressedMrope, let_cpu_runner_ask, with_places
from vlmzip.vllm.no_videos import NoVideosInfo
from vlmzip.vllm.processing import CompressedProcessor
from vlmzip.vllm.settings import OWN_BUDGET, REQUEST_KEY, Compression, engine_compression


class PackedProcessor(CompressedProcessor):
    """Before a stock Qwen multi-modal processor."""

    info: NoVideosInfo

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """A dummy prompt ends with text, as every prompt."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        return replace(inputs, prompt=[*inputs.prompt, 0])

    def _check_prompt(self, inputs: Any) -> None:
        super()._check_prompt(inputs)
        items = inputs.mm_data_items
        if (
            items.get_all_counts().get("image")
            and "image_embeds" in items["image"].get_passthrough_data()
        ):
            raise ValueError(
                "image embeddings that a client made are not compressed, so they cannot be sent to a "
                f"compressed {self.info.compression.family.name}; send the images"
            )
        if inputs.prompt[-1:] == [self.info.ctx.get_hf_config().image_token_id]:
            raise ValueError("the prompt ends with an image; write text after it")

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        stock = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [
            replace(update, replacement=self._kept_of(update.replacement, out_mm_kwargs))
            for update in stock
            if update.modality == "image"
        ]

    def _kept_of(self, stock: Any, processed: Any) -> Any:
        """The stock placeholders of an image, as many as its tokens that are kept.

        Raises:
            ValueError: The request's own fields made patches of another size than the model takes.
        """

        def kept(item: int) -> list[int]:
            whole: list[int] = stock(item)
            image = processed["image"][item]
            inputs = {
                "image_grid_thw": [image["image_grid_thw"].data],
                "pixel_values": image["pixel_values"].data,
            }
            family = self.info.compression.family
            return whole[: family.image_tokens(self.info.method, len(whole), inputs, 0)]

        return kept


class CompressedPacked(CompressedMrope):
    """Before a stock Qwen2-VL or Qwen2.5-VL; without settings in its config the stock model.

    An image's embeddings carry its tokens' places, see :mod:`vlmzip.vllm.mrope`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        stock: Any = self
        self.compression = engine_compression(vllm_config.model_config)
        self.encoder: PackedEncoder | None = None
        if self.compression is None:
            return
        _check_engine(vllm_config)
        # vLLM asks its own config, which knows of pruned videos only, and the model.
        config = vllm_config.model_config.get_multimodal_config()
        object.__setattr__(config, "is_multimodal_pruning_enabled", _always)
        self.supports_multimodal_pruning = self.is_multimodal_pruning_enabled = True
        let_cpu_runner_ask()
        if not isinstance(stock.visual, StageMissingLayer):
            self.encoder = PackedEncoder(
                stock.visual, self.compression, vllm_config, data_parallel=stock.use_data_parallel
            )

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Tokens of each image with their places, [K, D + channels]."""
        stock: Any = super()
        if self.encoder is None:
            return stock.embed_multimodal(**kwargs)
        asked = kwargs.pop(REQUEST_KEY)
        inputs = stock._parse_and_validate_image_input(**kwargs)
        return self.encoder.encode(
            inputs["pixel_values"], inputs["image_grid_thw"].tolist(), asked.tolist()
        )

    def get_encoder_cudagraph_config(self) -> Any:
        """No graphs of the compressed encoder: in them nothing can be read off."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return config if self.compression is None else replace(config, modalities=[])


def _always() -> bool:
    return True


def _check_engine(vllm_config: VllmConfig) -> None:
    """Refuse engines in which compression would go wrong.

    Raises:
        UnsupportedModelError: This is one.
    """
    multimodal = vllm_config.model_config.get_multimodal_config()
    lora = vllm_config.lora_config
    refused = {
        "--pipeline-parallel-size: later stages would not learn the positions of kept tokens": (
            vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
        "--enable-tower-connector-lora: rows of adapters are counted by what the tower gives": (
            lora is not None and lora.enable_tower_connector_lora
        ),
        "compile_mm_encoder: attention cannot be read off a compiled encoder": (
            vllm_config.compilation_config.compile_mm_encoder
        ),
        "--video-pruning-rate: videos are not supported": bool(multimodal.video_pruning_rate),
    }
    for reason, there in refused.items():
        if there:
            raise UnsupportedModelError(f"a compressed Qwen-VL does not run with {reason}; leave it off")


class PackedEncoder:
    """A packed tower and its compression.

    Args:
        visual: vLLM's ``Qwen2VisionTransformer`` or ``Qwen2_5_VisionTransformer``.
        compression: What the model's settings say; the family's ``tower`` is a ``PackedTower``.
        vllm_config: vLLM's config.
        data_parallel: Each rank has the whole tower and encodes some of the images.
    """

    def __init__(
        self, visual: Any, compression: Compression, vllm_config: VllmConfig, *, data_parallel: bool
    ) -> None:
        self.compression = compression
        self.tower: Any = compression.family.tower  # type: ignore[attr-defined]
        self.state = compression.family.attachment(compression.method)
        ranks = vllm_config.parallel_config.tensor_parallel_size if data_parallel else 1
        # As many merged tokens as vLLM would have encoded at a time without compression.
        self.at_a_time = vllm_config.scheduler_config.max_num_batched_tokens * ranks
        self._data_parallel = data_parallel
        self._visual = visual
        self._attention = visual.blocks[self.tower.block].attn
        self._attention.attn.register_forward_pre_hook(self._read, with_kwargs=True)
        self._frames: list[int] = []

    def encode(
        self, pixels_PC: Tensor, grids: Sequence[Sequence[int]], asked: Sequence[int]
    ) -> list[Tensor]:
        """Encode and compress images.

        Args:
            pixels_PC: The patches of all images.
            grids: Each image's frames (1), and its patches in rows and columns.
            asked: What each image's request asked for, or ``OWN_BUDGET``.

        Returns:
            [K, D + channels] for each image, see :func:`vlmzip.vllm.mrope.with_places`.

        Raises:
            ValueError: Patches, grids and budgets are not as many.
        """
        sizes = [prod(grid) for grid in grids]
        if sum(sizes) != len(pixels_PC) or len(grids) != len(asked):
            raise ValueError(
                f"{len(pixels_PC)} patches were given for images of {sizes} patches and {len(asked)} "
                "budgets"
            )
        kept: list[Tensor] = []
        pixels = pixels_PC.split(sizes)
        for part in self._steps(sizes):
            encoded = self._encode_some(torch.cat(pixels[part]), [list(grid) for grid in grids[part]])
            for rows, grid, budget in zip(encoded, grids[part], asked[part], strict=True):
                kept.append(self._compress(rows, grid, budget))
        return kept

    def _steps(self, sizes: Sequence[int]) -> Iterator[slice]:
        """Consecutive images that are encoded together: one or more, few enough merged tokens."""
        start, total = 0, 0
        for image, size in enumerate(sizes):
            merged = size // self.tower.merge**2
            if image > start and total + merged > self.at_a_time:
                yield slice(start, image)
                start, total = image, 0
            total += merged
        if sizes:
            yield slice(start, len(sizes))

    def _encode_some(self, pixels_PC: Tensor, grids: list[list[int]]) -> Sequence[Tensor]:
        """Each image's merged tokens, scores and keys, side by side: [M, D + 1 + d] float32."""
        if self._data_parallel:
            shared: tuple[Tensor, ...] = run_dp_sharded_mrope_vision_model(
                _AsTower(self), pixels_PC, grids, rope_type="rope_3d"
            )
            return shared
        sizes = [prod(grid) // self.tower.merge**2 for grid in grids]
        alone: tuple[Tensor, ...] = self.run(pixels_PC, grids).split(sizes)
        return alone

    def run(self, pixels_PC: Tensor, grids: list[list[int]]) -> Tensor:
        """One forward of the tower on this rank: [M, D + 1 + d] float32, which holds its dtype too."""
        self._frames = [h * w for t, h, w in grids for _ in range(t)]
        with self.state.tap.listen() as reading:
            hidden_MD: Tensor = self._visual(pixels_PC, grid_thw=grids)
            scores, keys = zip(*reading.take(), strict=True)
        ranks = self._attention.tp_size
        scores_1P, keys_1Pd = gather_heads(torch.cat(scores, 1), torch.cat(keys, 1), ranks)
        split = (part.split(self._frames, 1) for part in (scores_1P, keys_1Pd))
        records = list(zip(*split, strict=True))
        scores_M, keys_Md = self.tower.scores_and_keys(records, torch.tensor(grids))
        return torch.cat([hidden_MD.float(), scores_M.unsqueeze(1), keys_Md], 1)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of what :meth:`run` gives: token, score, key."""
        return self._visual.out_hidden_size, 1, self._attention.hidden_size_per_attention_head

    def _compress(self, rows_MF: Tensor, grid: Sequence[int], budget: int) -> Tensor:
        hidden_MD, scores_M1, keys_Md = rows_MF.split(self.widths, 1)
        method = None if budget == OWN_BUDGET else self.compression.method_for(budget)
        t, h, w = grid
        out = self.tower.zip_image(
            hidden_MD.to(self._visual.dtype), scores_M1[:, 0], keys_Md, (t, h, w), self.state, method
        )
        return with_places(out.tokens[0], places(out)[0], w // self.tower.merge)

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the attention that is read: its queries and keys, [1, P, H, d] of this rank."""
        if self.state.tap.reading is None:
            return
        q_1HPd, k_1HPd = (kwargs[name].transpose(1, 2) for name in ("query", "key"))
        frames = zip(q_1HPd.split(self._frames, 2), k_1HPd.split(self._frames, 2), strict=True)
        for query, key in frames:
            self.state.tap.note(query, key, self._attention.attn.scale, None)


class _AsTower:
    """The encoder as vLLM shards a tower over ranks: what it gives travels as the tokens alone would."""

    def __init__(self, encoder: PackedEncoder) -> None:
        self.spatial_merge_size = encoder.tower.merge
        self.out_hidden_size = sum(encoder.widths)
        self._run = encoder.run

    def __call__(self, pixels_PC: Tensor, grids: list[list[int]]) -> Tensor:
        return self._run(pixels_PC, grids)

    def parameters(self) -> Iterator[Tensor]:
        """What vLLM takes the dtype of the output from."""
        return iter([torch.empty(0)])
