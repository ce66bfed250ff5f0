"""Choosing dominant and contextual tokens, and merging the rest into the contextual ones.

Shapes: B views, N tokens, K kept tokens, D hidden size, d key size. Everything has a static
shape (no boolean masks), so it compiles into one graph. Ties go to the lower index.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmzip.budget import check_count

Merge = Literal["reference", "average"]
Order = Literal["grouped", "raster"]


@dataclass(frozen=True)
class ZipOutput:
    """The kept tokens, and where each of a view's tokens went.

    Attributes:
        tokens: [B, K, D], dtype of the hidden states.
        dominant: [B, dominant] int64, indices into the N tokens, ascending; CLS, if any, is first.
        contextual: [B, contextual] int64, indices of the contextual targets, ascending.
        assignment: [B, N] int64, the row of ``tokens`` that each token went into, -1 if none.
        scores: [B, N] float32, what the choice was made by; None where the caller has them.
    """

    tokens: Tensor
    dominant: Tensor
    contextual: Tensor
    assignment: Tensor
    scores: Tensor | None = None


def zip_tokens(
    hidden: Tensor,
    scores: Tensor,
    keys: Tensor,
    dominant: int,
    contextual: int,
    cls_token: bool = True,
    merge: Merge = "reference",
    order: Order = "grouped",
) -> ZipOutput:
    """Keep the dominant tokens of each view and merge the others into contextual tokens.

    VisionZip, algorithms 1 and 2; where paper and released code differ, as the released code does.

    Args:
        hidden: [B, N, D] floating, the vision tower's tokens; token 0 is CLS if ``cls_token``.
        scores: [B, N] floating, attention that tokens get; entry 0 is ignored if ``cls_token``.
        keys: [B, N, d] floating, head-mean keys, unnormalised; similarity is their cosine.
        dominant: Tokens kept as they are, CLS among them; at least 1.
        contextual: Tokens that the others are merged into; may be 0, then the others are dropped.
        cls_token: Token 0 is a CLS token. It is always kept.
        merge: "reference": target + mean(assigned), as the released code does. "average": mean over
            target and assigned, as the paper says.
        order: "grouped": dominant ascending, then contextual ascending. "raster": all ascending.

    Returns:
        K = ``dominant + contextual`` tokens a view. Gradients flow to ``hidden`` only.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes disagree, a count does not fit N, or a value is NaN or infinite (compiled
            code asserts the latter when it runs, with a RuntimeError).
    """
    _check_tensors(hidden, scores, keys)
    if not isinstance(cls_token, bool):
        raise ValueError(f"cls_token must be True or False, got {cls_token!r}")
    dominant = check_count("dominant", dominant, 1)
    contextual = check_count("contextual", contextual, 0)
    if dominant + contextual > hidden.shape[1]:
        raise ValueError(
            f"dominant + contextual = {dominant} + {contextual} exceeds the {hidden.shape[1]} tokens "
            "of a view; give fewer"
        )
    check_choice("merge", merge, get_args(Merge))
    check_choice("order", order, get_args(Order))
    for name, tensor in (("hidden", hidden), ("scores", scores), ("keys", keys)):
        finite = tensor[:, int(cls_token and name == "scores") :].isfinite().all()
        message = f"{name} holds NaN or infinite values; check the model's weights and dtype"
        if torch.compiler.is_compiling():
            torch._assert_async(finite, message)
        elif not finite:
            raise ValueError(message)
    return merge_tokens(hidden, scores, keys, dominant, contextual, cls_token, merge, order)


def merge_tokens(
    hidden: Tensor,
    scores: Tensor,
    keys: Tensor,
    dominant: int,
    contextual: int,
    cls_token: bool,
    merge: Merge,
    order: Order,
) -> ZipOutput:
    """:func:`zip_tokens` without its checks, for engines that have checked once already."""
    with torch.no_grad():
        dominant_BD, rest_BR = choose_dominant(scores, dominant, cls_token)
    if contextual == 0:
        return keep_tokens(hidden, dominant_BD)
    with torch.no_grad():
        step = max(1, rest_BR.shape[1] // contextual)
        target_BM = rest_BR[:, : step * contextual : step]
        cluster_BN = nearest_target(keys, dominant_BD, target_BM)
        weights_BMN = merge_weights(cluster_BN, dominant_BD, target_BM, merge)
    # float32 sums, whatever the dtype or autocast: a cluster can hold hundreds of tokens.
    with torch.autocast(hidden.device.type, enabled=False):
        merged_BMD = (weights_BMN @ hidden.float()).to(hidden.dtype)
    tokens_BKD = torch.cat([gather_tokens(hidden, dominant_BD), merged_BMD], 1)
    row_BK = torch.arange(dominant + contextual, device=hidden.device).expand(hidden.shape[0], -1)
    if order == "raster":
        raster_BK = torch.cat([dominant_BD, target_BM], 1).argsort(1)
        tokens_BKD = gather_tokens(tokens_BKD, raster_BK)
        row_BK = raster_BK.argsort(1)
    rows_B, rows_M = row_BK[:, :dominant], row_BK[:, dominant:]
    assignment_BN = rows_M.gather(1, cluster_BN).scatter(1, dominant_BD, rows_B)
    return ZipOutput(tokens_BKD, dominant_BD, target_BM, assignment_BN)


def choose_dominant(scores: Tensor, dominant: int, cls_token: bool) -> tuple[Tensor, Tensor]:
    """Indices of the best-scored tokens [B, dominant] and of the rest [B, N - dominant], ascending."""
    scores_BN = scores.float()
    if cls_token:
        scores_BN = torch.cat([torch.full_like(scores_BN[:, :1], torch.inf), scores_BN[:, 1:]], 1)
    ranked_BN = scores_BN.sort(dim=1, descending=True, stable=True).indices
    return ranked_BN[:, :dominant].sort(1).values, ranked_BN[:, dominant:].sort(1).values


def nearest_target(keys: Tensor, dominant_BD: Tensor, target_BM: Tensor) -> Tensor:
    """The target each token belongs to [B, N]: a target to itself, others to the nearest by cosine.

    Dominant tokens get an entry too; it means nothing.
    """
    unit_BNd = normalize(keys.float(), dim=-1)
    with torch.autocast(keys.device.type, enabled=False):
        similarity_BNM = unit_BNd @ gather_tokens(unit_BNd, target_BM).transpose(1, 2)
    own_BM = torch.arange(target_BM.shape[1], device=keys.device).expand_as(target_BM)
    return similarity_BNM.argmax(-1).scatter(1, target_BM, own_BM)


def merge_weights(cluster_BN: Tensor, dominant_BD: Tensor, target_BM: Tensor, merge: Merge) -> Tensor:
    """What each token weighs in each contextual token: [B, M, N] float32."""
    row_M1 = torch.arange(target_BM.shape[1], device=cluster_BN.device).unsqueeze(-1)
    member_BMN = (cluster_BN.unsqueeze(1) == row_M1).float()
    target_B1N = torch.zeros_like(cluster_BN).scatter(1, target_BM, 1).unsqueeze(1)
    merged_B1N = 1 - target_B1N.scatter(2, dominant_BD.unsqueeze(1), 1)
    assigned_BMN, own_BMN = member_BMN * merged_B1N, member_BMN * target_B1N
    count_BM1 = assigned_BMN.sum(-1, keepdim=True)
    if merge == "reference":
        return own_BMN + assigned_BMN / count_BM1.clamp(min=1)
    return (own_BMN + assigned_BMN) / (count_BM1 + 1)


def keep_tokens(hidden: Tensor, kept_BK: Tensor) -> ZipOutput:
    """Keep the tokens at ``kept_BK`` [B, K], ascending, and drop the others."""
    row_BK = torch.arange(kept_BK.shape[1], device=hidden.device).expand_as(kept_BK)
    nowhere_BN = torch.full(hidden.shape[:2], -1, dtype=torch.int64, device=hidden.device)
    return ZipOutput(
        tokens=gather_tokens(hidden, kept_BK),
        dominant=kept_BK,
        contextual=kept_BK[:, :0],
        assignment=nowhere_BN.scatter(1, kept_BK, row_BK),
    )


def gather_tokens(tokens_BND: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of [B, N, D] by [B, K] indices: [B, K, D]."""
    return tokens_BND.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, tokens_BND.shape[-1]))


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_tensors(hidden: Tensor, scores: Tensor, keys: Tensor) -> None:
    for name, tensor, axes in (("hidden", hidden, 3), ("scores", scores, 2), ("keys", keys, 3)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.ndim != axes:
            raise ValueError(f"{name} must have {axes} axes, got shape {tuple(tensor.shape)}")
        if tensor.shape[:2] != hidden.shape[:2]:
            raise ValueError(
                f"{name} is for [B, N] = {list(tensor.shape[:2])}, hidden for {list(hidden.shape[:2])}"
            )
