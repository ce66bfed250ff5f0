"""What the settings in a served model's config mean: its family, its method, requests' budgets.

Imports no vllm: front end and workers each read the same config by this one rule.
"""

import json
from dataclasses import dataclass
from typing import Any

from vlmzip.budget import check_count
from vlmzip.compress import settle, stored_method
from vlmzip.families import Family, family_of
from vlmzip.methods import Method

REQUEST_KEY = "visual_tokens"
OWN_BUDGET = 0  # what an image carries whose request asked for no budget
_OWN_PREFIX = "Vlmzip"


@dataclass(frozen=True)
class Compression:
    """How a served model compresses its images.

    Attributes:
        family: The model's family, fitted to its config.
        method: The method, its ``order`` settled, with the budget of requests that ask for none.
    """

    family: Family
    method: Method

    @property
    def most(self) -> int | None:
        """The most tokens a view that a request may ask for; None: requests may not ask.

        ``max_visual_tokens``, or else what images get that do not ask. A share of an image's tokens,
        or a total over its views, is no number to be compared with: then requests may not ask.
        """
        budget = self.method.budget
        pair = (budget.dominant or 0) + (budget.contextual or 0)
        return self.method.max_visual_tokens or budget.tokens or pair or None

    def asked(self, visual_tokens: object) -> int:
        """Check what a request asked for.

        Raises:
            ValueError: It is not an integer from 1 to :attr:`most`, or requests may not ask.
        """
        if self.most is None:
            raise ValueError(
                f"{REQUEST_KEY}={visual_tokens!r} was asked for, but this model is served with "
                f"{self.method.settings()}, which sets no max_visual_tokens; leave {REQUEST_KEY} out"
            )
        try:
            k = check_count(REQUEST_KEY, visual_tokens, 1)
        except ValueError as error:
            raise ValueError(f"{error}; {self._allowed()}") from error
        if k > self.most:
            raise ValueError(f"{REQUEST_KEY} must be at most {self.most}, got {k}; {self._allowed()}")
        return k

    def method_for(self, asked: int) -> Method:
        """The method with the budget that was asked for, or with its own at ``OWN_BUDGET``."""
        return self.method if asked == OWN_BUDGET else self.method.with_tokens(asked)

    def fingerprint(self, asked: int) -> str:
        """What makes one image's tokens differ from another compression's, for the keys of caches."""
        return json.dumps(self.method_for(asked).settings(), sort_keys=True)

    def _allowed(self) -> str:
        return f"this model takes 1 to {self.most} tokens a view (image, crop or frame)"


def compression_of(config: Any) -> Compression | None:
    """Read a served model's config; None if it is served as it is.

    Raises:
        ValueError: The settings are wrong or do not fit the model, or the architecture is one of ours
            and there are none.
        UnsupportedModelError: The model cannot be compressed.
    """
    names = getattr(config, "architectures", None) or []
    if getattr(config, "vlmzip", None) is None:
        if own := [name for name in names if name.startswith(_OWN_PREFIX)]:
            raise ValueError(
                f"the architecture {own[0]} never runs uncompressed, and its config holds no vlmzip "
                'settings; give them, such as --hf-overrides \'{"vlmzip": {"method": "visionzip", '
                '"tokens": 64}}\', or serve the stock architecture '
                f"{own[0].removeprefix(_OWN_PREFIX)}"
            )
        return None
    family = family_of(config)
    method = settle(stored_method(config), family)
    family.attachment(method)
    if method.max_visual_tokens is not None:
        try:
            family.attachment(method.with_tokens(method.max_visual_tokens))
        except ValueError as error:
            most = method.max_visual_tokens
            raise ValueError(f"max_visual_tokens={most} does not fit: {error}") from error
    return Compression(family, method)


def engine_compression(model_config: Any) -> Compression | None:
    """The same of vLLM's ``ModelConfig``; front end and workers both ask, so that neither starts.

    vLLM takes a ValueError of the front end's processor for a model without images and goes on.

    Raises:
        ValueError: Also if the engine's ``mm_processor_kwargs`` set a budget.
    """
    compression = compression_of(model_config.hf_config)
    fields = getattr(model_config.multimodal_config, "mm_processor_kwargs", None) or {}
    if compression is not None and REQUEST_KEY in fields:
        raise ValueError(
            f"{REQUEST_KEY} belongs to requests; for the whole engine give tokens in the vlmzip "
            "settings, and max_visual_tokens for the most that a request may ask for"
        )
    return compression
