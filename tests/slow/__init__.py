"""Slow paths: one module a family, named as the family, that compresses by hand.

They run on an uncompressed model and know nothing of the fast code: eager attention with all
attentions kept, the loops of reference.py, nothing cached. A module offers

    features(model, inputs, method) -> list[Tensor]
        Per image or video in prompt order [n_i, D], what the LLM must get at its placeholders.
        `inputs` is what the compressed processor made; only its pixels and sizes count.

and, where the default of contract.py does not do,

    builds() -> dict[str, Callable[[], (model, processor)]]   variants; default: vlmzip.tiny.random
    methods() -> list[Method]                     budgets to run; default: contract.METHODS
    images() -> list[PIL.Image]                   three images of different size
    prompt(processor, images, text) -> str        a prompt with that many images
    process(processor, texts, images) -> dict     a padded batch, images listed row by row
    positions(model, inputs, method) -> Tensor    position ids of inputs["input_ids"] (M-RoPE families)
    logits(model, inputs, features, method) -> Tensor   [B, T, V] of inputs["input_ids"]
    dropped(processor) -> set[int]                ids of layout tokens that compression drops
    ANSWER_TYPE = 1                               token_type_ids of an answer; default: 0
    NEEDS_TORCHVISION = True                      no processor without it
    LATER_IMAGES = False                          stock itself cannot add an image in a later turn
"""

from typing import Any

import torch
from torch import Tensor

import reference


def counts(method: Any, n: int, *, views: int = 1, dynamic: bool = False) -> tuple[int, int]:
    """(dominant, contextual) that a view of n tokens keeps under a VisionZip method."""
    k = reference.budget(
        n,
        tokens=method.tokens,
        dominant=method.dominant,
        contextual=method.contextual,
        keep=method.keep,
        total_tokens=method.total_tokens,
        views=views,
        dynamic=dynamic,
    )
    if method.dominant is not None and method.dominant + method.contextual == k:
        return method.dominant, method.contextual
    return reference.split(k)


def zip_view(
    method: Any,
    hidden: Tensor,
    attention: Tensor,
    keys: Tensor,
    cls_token: bool,
    order: str,
    *,
    views: int = 1,
    dynamic: bool = False,
) -> reference.Zipped:
    """One view, by the reference.

    Args:
        hidden: [N, D], the tower's tokens, CLS included.
        attention: [H, N, N], softmaxed.
        keys: [H, N, d].
        order: The family's own.
    """
    scores = attention[:, 0].mean(0) if cls_token else attention.mean((0, 1))
    keys_Nd = keys.mean(0)
    if cls_token and not method.send_cls:
        hidden, scores, keys_Nd, cls_token = hidden[1:], scores[1:], keys_Nd[1:], False
    dominant, contextual = counts(method, len(hidden), views=views, dynamic=dynamic)
    if dominant + contextual == len(hidden):
        every = torch.arange(len(hidden))[None]
        return reference.Zipped(hidden[None].double(), every, every[:, :0], every)
    return reference.zip_tokens(
        hidden[None],
        scores[None],
        keys_Nd[None],
        dominant=dominant,
        contextual=contextual,
        cls_token=cls_token,
        merge=method.merge,
        order=method.order or order,
    )
