"""The front end's side: K placeholders an image, the request's budget, and the keys of caches.

Mixins for vLLM's processing info and multi-modal processor of a family; they go before the stock
class. A request's budget makes a copy of both for that request, so that whatever counts tokens in
between counts them by it, in any thread.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from vlmzip.methods import Method
from vlmzip.vllm.requests import check_fields, check_images
from vlmzip.vllm.settings import OWN_BUDGET, REQUEST_KEY, Compression, engine_compression


def compressed_processing(
    stock: Any, info: type["CompressedInfo"], processor: type["CompressedProcessor"]
) -> Callable[[type], type]:
    """Class decorator of a model: how its requests are processed.

    Args:
        stock: vLLM's model class; its processing is used where the config holds no settings.
        info: Our processing info otherwise.
        processor: Our processor otherwise.
    """
    factory = stock._processor_factory

    def build_info(ctx: Any) -> Any:
        compression = engine_compression(ctx.model_config)
        return factory.info(ctx) if compression is None else info(ctx, compression)

    def build_processor(built: Any, dummy_inputs: Any) -> Any:
        build: Any = processor if isinstance(built, info) else factory.processor
        return build(built, dummy_inputs)

    decorator: Callable[[type], type] = MULTIMODAL_REGISTRY.register_processor(
        build_processor, info=build_info, dummy_inputs=factory.dummy_inputs
    )
    return decorator


class CompressedInfo:
    """Before a stock ``BaseProcessingInfo``: counts tokens as the family does.

    Args:
        ctx: vLLM's context.
        compression: What the model's settings say.
    """

    ctx: Any
    get_hf_processor: Any

    def __init__(self, ctx: Any, compression: Compression) -> None:
        super().__init__(ctx)  # type: ignore[call-arg]
        self.compression = compression
        self.asked = OWN_BUDGET

    @property
    def method(self) -> Method:
        """The method with this request's budget."""
        return self.compression.method_for(self.asked)

    def asking(self, visual_tokens: object) -> Self:
        """A copy for one request that asks for so many tokens a view.

        Raises:
            ValueError: It may not.
        """
        twin = copy.copy(self)
        twin.asked = self.compression.asked(visual_tokens)
        return twin

    def largest(self) -> Self:
        """A copy for the request whose images keep the most tokens."""
        most = self.compression.most
        if most is None or self.asking(most).get_max_image_tokens() <= self.get_max_image_tokens():
            return self
        return self.asking(most)

    def get_num_image_tokens(self, *, image_width: int, image_height: int, **stock_options: Any) -> int:
        """Placeholders of an image of so many pixels; some stock infos take options of their own."""
        stock = super().get_num_image_tokens(  # type: ignore[misc]
            image_width=image_width, image_height=image_height, **stock_options
        )
        size = (image_height, image_width)
        return self.compression.family.sized_image_tokens(self.method, stock, size)

    def get_max_image_tokens(self) -> int:
        """Placeholders of the largest image."""
        most: int = super().get_max_image_tokens()  # type: ignore[misc]
        return most

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        """Placeholders of the largest image with the largest budget: what encoder caches are sized by."""
        return {"image": self.largest().get_max_image_tokens()}


class CompressedProcessor:
    """Before a stock ``BaseMultiModalProcessor``, with a :class:`CompressedInfo`.

    Each image carries ``visual_tokens``, the budget that its request asked for, to the model.
    """

    info: CompressedInfo

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one request; a budget of its own is taken from ``hf_processor_mm_kwargs``.

        Raises:
            ValueError: The budget is not allowed, placeholders and images are not as many, an image is
                too elongated, or the processor does not know a field.
        """
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        if REQUEST_KEY in kwargs:
            twin = copy.copy(self)
            twin.info = self.info.asking(kwargs.pop(REQUEST_KEY))
            return twin.apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)
        self._check_prompt(inputs)
        check_images(inputs.mm_data_items)
        check_fields(kwargs, self.info.get_hf_processor())
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The dummy images that memory is measured with have the largest budget."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        asked = self.info.largest().asked
        if asked == OWN_BUDGET:
            return inputs
        return replace(
            inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, REQUEST_KEY: asked}
        )

    def _check_prompt(self, inputs: Any) -> None:
        """vLLM would fail on too few placeholders, and take surplus ones for text."""
        images = inputs.mm_data_items.get_all_counts().get("image", 0)
        placeholders = list(inputs.prompt).count(self.info.ctx.get_hf_config().image_token_id)
        if images and placeholders != images:
            raise ValueError(
                f"the prompt has {placeholders} image placeholders for {images} images; write one for "
                "each image"
            )

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Keys of the processor's, the encoder's and the prefix cache, with settings and budget in them.

        Ids that clients give their images are hashed with them, too.
        """
        salt = {"vlmzip": self.info.compression.fingerprint(self.info.asked)}
        salted = replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, **salt})
        return super()._get_mm_hashes(salted)  # type: ignore[misc]

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        inputs = super()._get_hf_mm_inputs(mm_items, hf_kwargs)  # type: ignore[misc]
        if not inputs.hf_data:  # all cached, or embeddings that the client made
            return inputs
        asked = torch.full((mm_items.get_all_counts()["image"],), self.info.asked)
        return inputs._replace(passthrough_data={**inputs.passthrough_data, REQUEST_KEY: asked})

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        try:
            processed = super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        except TypeError as error:  # such as a list in a list, which vLLM cannot hash
            if not hf_kwargs:
                raise
            raise ValueError(f"mm_processor_kwargs cannot be used: {error}") from error
        if processed.get("pixel_values") is not None:
            self._check_processed(processed)
        return processed

    def _check_processed(self, processed: Any) -> None:
        """Refuse images that the request's own fields made of another size than the model takes.

        The model would refuse them too, but an error there ends the engine.

        Raises:
            ValueError: There are some.
        """

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        stock = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        return {**stock, REQUEST_KEY: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}
