"""VisionZip written out slowly: loops, float64, one formula a function.

This is what the fast code is measured against, so it shares nothing with it: no torch arithmetic,
no batching, no sorting tricks. Formulae: VisionZip (arXiv 2412.04467), algorithms 1 and 2 and
appendix A.2; where paper and released code differ, both merges are here.

Tensors of any dtype go in; float64 and int64 CPU tensors come out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[np.float64]]


def as_float64(tensor: torch.Tensor) -> Array:
    return tensor.detach().cpu().to(torch.float64).numpy()


# --- scores and keys from one layer's q and k -------------------------------------------------


def mask_as_bias(mask: torch.Tensor | None, shape: tuple[int, int, int, int]) -> Array:
    """[B,H,N,N] float64 to add to the logits; -inf where a query may not attend.

    A float mask closes an entry with -inf or with the lowest number of its own dtype.
    """
    if mask is None:
        return np.zeros(shape)
    full = mask.detach().cpu().expand(shape)
    if full.dtype == torch.bool:
        return np.where(full.numpy(), 0.0, -np.inf)
    lowest = torch.finfo(full.dtype).min
    bias = as_float64(full).copy()
    bias[bias <= lowest] = -np.inf
    return bias


def softmax_row(logits: Array) -> list[float]:
    """One query's attention; all zeros when it may attend to nothing."""
    highest = max(float(value) for value in logits)
    if highest == -math.inf:
        return [0.0] * len(logits)
    exponentials = [math.exp(float(value) - highest) for value in logits]
    total = math.fsum(exponentials)
    return [value / total for value in exponentials]


def attention_row(
    q_BHNd: Array, k_BHNd: Array, bias_BHNN: Array, scale: float, b: int, h: int, query: int
) -> list[float]:
    return softmax_row(k_BHNd[b, h] @ q_BHNd[b, h, query] * scale + bias_BHNN[b, h, query])


def cls_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """[B,N]: mean over heads of the attention that token 0 pays to each token, itself included."""
    batch, heads, tokens, _ = q.shape
    bias = mask_as_bias(mask, (batch, heads, tokens, tokens))
    q_BHNd, k_BHNd = as_float64(q), as_float64(k)
    scores = torch.zeros(batch, tokens, dtype=torch.float64)
    for b in range(batch):
        rows = [attention_row(q_BHNd, k_BHNd, bias, scale, b, h, 0) for h in range(heads)]
        for j in range(tokens):
            scores[b, j] = math.fsum(row[j] for row in rows) / heads
    return scores


def received_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """[B,N]: mean over heads and over queries of the attention that each token receives.

    A query that may attend to nothing is neither added nor counted.
    """
    batch, heads, tokens, _ = q.shape
    bias = mask_as_bias(mask, (batch, heads, tokens, tokens))
    q_BHNd, k_BHNd = as_float64(q), as_float64(k)
    scores = torch.zeros(batch, tokens, dtype=torch.float64)
    for b in range(batch):
        received, counted = [0.0] * tokens, 0
        for h in range(heads):
            for query in range(tokens):
                row = attention_row(q_BHNd, k_BHNd, bias, scale, b, h, query)
                if sum(row) == 0.0:
                    continue
                counted += 1
                for j in range(tokens):
                    received[j] += row[j]
        for j in range(tokens):
            scores[b, j] = received[j] / counted if counted else 0.0
    return scores


def mean_keys(k: torch.Tensor) -> torch.Tensor:
    """[B,N,d]: mean of the keys over heads, not normalised."""
    batch, heads, tokens, width = k.shape
    k_BHNd = as_float64(k)
    keys = torch.zeros(batch, tokens, width, dtype=torch.float64)
    for b in range(batch):
        for j in range(tokens):
            for c in range(width):
                keys[b, j, c] = math.fsum(float(k_BHNd[b, h, j, c]) for h in range(heads)) / heads
    return keys


# --- one image: which tokens stay, which go where ---------------------------------------------


def choose_dominant(scores: list[float], dominant: int, cls_token: bool) -> list[int]:
    """Indices of the dominant tokens, ascending. With a CLS token, it is one of them."""
    chosen = [0] if cls_token else []
    while len(chosen) < dominant:
        best = -1
        for j in range(len(scores)):
            # Strictly greater, walking upwards: an equal score keeps the lower index.
            if j not in chosen and (best < 0 or scores[j] > scores[best]):
                best = j
        chosen.append(best)
    return sorted(chosen)


def choose_targets(tokens: int, dominant: list[int], contextual: int) -> list[int]:
    """Indices of the contextual targets: rest[0], rest[step], ... of the tokens that remain."""
    if contextual == 0:
        return []
    rest = [j for j in range(tokens) if j not in dominant]
    step = max(1, len(rest) // contextual)
    return [rest[i * step] for i in range(contextual)]


def unit(vector: list[float]) -> list[float]:
    """Length 1. A vector of zeros stays zero, and so is similar to nothing."""
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector] if length > 0.0 else vector


def cosines(units: list[list[float]], targets: list[int], j: int) -> list[float]:
    """Of token j with each target, the keys being of length 1."""
    return [sum(x * y for x, y in zip(units[j], units[t], strict=True)) for t in targets]


def choose_groups(keys: list[list[float]], dominant: list[int], targets: list[int]) -> list[int]:
    """For each token: the target it is merged into, itself if it stays, -1 if it is dropped."""
    units = [unit(key) for key in keys]
    groups = []
    for j in range(len(keys)):
        if j in dominant or j in targets:
            groups.append(j)
        elif not targets:
            groups.append(-1)
        else:
            near = cosines(units, targets, j)
            groups.append(targets[near.index(max(near))])
    return groups


def merge_group(hidden: Array, target: int, assigned: list[int], merge: str) -> Array:
    """[D]: "reference" is target + mean(assigned), "average" the mean over all of them."""
    total = np.zeros(hidden.shape[1])
    for j in assigned:
        total = total + hidden[j]
    if merge == "average":
        return (hidden[target] + total) / (1 + len(assigned))
    assert merge == "reference"
    return hidden[target] + (total / len(assigned) if assigned else 0.0)


def output_order(dominant: list[int], targets: list[int], order: str) -> list[int]:
    """The kept tokens' indices, row by row of the output."""
    if order == "raster":
        return sorted(dominant + targets)
    assert order == "grouped"
    return dominant + targets


# --- a batch ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zipped:
    tokens: torch.Tensor  # [B,K,D] float64
    dominant: torch.Tensor  # [B,dominant] int64
    contextual: torch.Tensor  # [B,contextual] int64
    assignment: torch.Tensor  # [B,N] int64, a row of tokens or -1


def indices(rows: list[list[int]], width: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)


def zip_tokens(
    hidden: torch.Tensor,
    scores: torch.Tensor,
    keys: torch.Tensor,
    *,
    dominant: int,
    contextual: int,
    cls_token: bool,
    merge: str = "reference",
    order: str = "grouped",
    assignment: torch.Tensor | None = None,
) -> Zipped:
    """The whole method. A given `assignment` [B,N] (rows of tokens) replaces the choice by keys."""
    hidden_BND = as_float64(hidden)
    batch, tokens, width = hidden_BND.shape
    all_dominant, all_targets, all_rows, merged = [], [], [], []
    for b in range(batch):
        stay = choose_dominant(as_float64(scores[b]).tolist(), dominant, cls_token)
        targets = choose_targets(tokens, stay, contextual)
        kept = output_order(stay, targets, order)
        if assignment is None:
            groups = choose_groups(as_float64(keys[b]).tolist(), stay, targets)
        else:
            groups = [kept[row] if row >= 0 else -1 for row in assignment[b].tolist()]
        for index in kept:
            assigned = [j for j in range(tokens) if groups[j] == index and j != index]
            assert not (assigned and index in stay), "a token was merged into a dominant one"
            merged.append(
                hidden_BND[b, index]
                if index in stay
                else merge_group(hidden_BND[b], index, assigned, merge)
            )
        all_dominant.append(stay)
        all_targets.append(targets)
        all_rows.append([kept.index(group) if group >= 0 else -1 for group in groups])
    return Zipped(
        tokens=torch.from_numpy(np.array(merged)).reshape(batch, dominant + contextual, width),
        dominant=indices(all_dominant, dominant),
        contextual=indices(all_targets, contextual),
        assignment=indices(all_rows, tokens),
    )


def zip_layer(
    hidden: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    *,
    dominant: int,
    contextual: int,
    cls_token: bool,
    merge: str = "reference",
    order: str = "grouped",
    send_cls: bool = True,
    mask: torch.Tensor | None = None,
) -> Zipped:
    """From one layer's output [B,N,D] and its q, k [B,H,N,d] to the kept tokens.

    With `send_cls=False` the patches alone are compressed, by the CLS row's scores; indices then
    count patches.
    """
    scores = (cls_attention if cls_token else received_attention)(q, k, scale, mask)
    keys = mean_keys(k)
    if cls_token and not send_cls:
        hidden, scores, keys, cls_token = hidden[:, 1:], scores[:, 1:], keys[:, 1:], False
    return zip_tokens(
        hidden,
        scores,
        keys,
        dominant=dominant,
        contextual=contextual,
        cls_token=cls_token,
        merge=merge,
        order=order,
    )


# --- budgets ----------------------------------------------------------------------------------


def split(k: int) -> tuple[int, int]:
    """(dominant, contextual) of k tokens in the paper's 27:5 proportion."""
    dominant = max(1, math.floor(27 * k / 32 + 0.5))
    return dominant, k - dominant


def budget(
    n: int,
    *,
    tokens: int | None = None,
    dominant: int | None = None,
    contextual: int | None = None,
    keep: float | None = None,
    total_tokens: int | None = None,
    views: int = 1,
    dynamic: bool = False,
) -> int:
    """K for a view of n tokens; ValueError where the design refuses."""
    if tokens is not None:
        k = tokens
    elif dominant is not None and contextual is not None:
        k = dominant + contextual
    elif keep is not None:
        k = max(1, math.floor(keep * n + 0.5))
    else:
        assert total_tokens is not None
        k = total_tokens // views
        if k < 2:
            raise ValueError("under 2 tokens a view")
    if k > n and not dynamic:
        raise ValueError("more tokens than there are")
    return min(k, n)


# --- comparing --------------------------------------------------------------------------------


def assert_same_zip(
    out: Any,
    hidden: torch.Tensor,
    scores: torch.Tensor,
    keys: torch.Tensor,
    *,
    exact: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **settings: Any,
) -> None:
    """`out` equals the reference on the same inputs.

    Indices must be equal. Only a cosine that float32 cannot tell from the best one (within 2e-6)
    may lead elsewhere, and not even that with `exact`, for keys whose cosines are exact in float32.
    Values are then compared under the assignment that was taken.
    """
    ref = zip_tokens(hidden, scores, keys, **settings)
    assert torch.equal(out.dominant.cpu(), ref.dominant)
    assert torch.equal(out.contextual.cpu(), ref.contextual)
    taken = out.assignment.cpu()
    assert taken.shape == ref.assignment.shape
    if exact:
        assert torch.equal(taken, ref.assignment)
    for b, j in (taken != ref.assignment).nonzero().tolist():
        stay, targets = ref.dominant[b].tolist(), ref.contextual[b].tolist()
        kept = output_order(stay, targets, settings.get("order", "grouped"))
        row = int(taken[b, j])
        assert row >= 0, f"token {j} of image {b} was dropped"
        assert j not in kept, f"token {j} of image {b} stays, but was put into row {row}"
        assert kept[row] in targets, f"token {j} of image {b} went into a dominant token"
        near = cosines([unit(key) for key in as_float64(keys[b]).tolist()], targets, j)
        short = max(near) - near[targets.index(kept[row])]
        assert short < 2e-6, f"token {j} of image {b} missed its nearest target by {short}"
    ref = zip_tokens(hidden, scores, keys, assignment=taken, **settings)
    assert out.tokens.shape == ref.tokens.shape
    torch.testing.assert_close(
        out.tokens.detach().cpu().to(torch.float64), ref.tokens, rtol=rtol, atol=atol
    )
