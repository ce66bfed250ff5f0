"""Scores and keys from q and k, against the slow reference; what they cost; odd masks."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import reference
from vlmzip.attention import cls_attention, mean_keys, received_attention

SCORES = {"cls": cls_attention, "received": received_attention}
SLOW = {"cls": reference.cls_attention, "received": reference.received_attention}
both = pytest.mark.parametrize("kind", SCORES)
slow = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def example(
    batch: int = 2, heads: int = 3, tokens: int = 19, width: int = 8, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, heads, tokens, width, generator=generator)
    return q, k


def assert_scores(kind: str, scores: torch.Tensor, *args: Any, rtol: float = 1e-5) -> None:
    assert scores.dtype == torch.float32
    slow_scores = SLOW[kind](*args)
    torch.testing.assert_close(scores.double(), slow_scores, rtol=rtol, atol=1e-7)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = tuple(draw(st.integers(1, most)) for most in (3, 3, 12, 5))
    elements = st.floats(-8, 8, width=32)
    q, k = (torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=elements))) for _ in "qk")
    scale = draw(st.sampled_from([0.125, 0.5, 1.0, shape[3] ** -0.5]))
    batch, _, tokens, _ = shape
    kind = draw(st.sampled_from(["none", "bool", "-inf", "lowest"]))
    if kind == "none":
        return q, k, scale, None
    sizes = draw(
        st.sampled_from(
            [
                (batch, 1, tokens, tokens),
                (1, 1, tokens, tokens),
                (batch, 1, 1, tokens),
                (1, 1, 1, tokens),
                (batch, 1, tokens, 1),
                (tokens, tokens),
            ]
        )
    )
    allowed = torch.from_numpy(draw(hnp.arrays(np.bool_, sizes)))
    if kind == "bool":
        return q, k, scale, allowed
    closed = -torch.inf if kind == "-inf" else torch.finfo(torch.float32).min
    bias = torch.from_numpy(draw(hnp.arrays(np.float32, sizes, elements=st.floats(-3, 3, width=32))))
    return q, k, scale, bias.masked_fill(~allowed, closed)


# --- parity -----------------------------------------------------------------------------------


@slow
@given(inputs(), st.sampled_from([1, 2, 5, 128]))
def test_received_attention_equals_the_reference(case: tuple[Any, ...], chunk: int) -> None:
    q, k, scale, mask = case
    scores = received_attention(q, k, scale, mask, chunk=chunk)
    assert_scores("received", scores, q, k, scale, mask)


@slow
@given(inputs())
def test_cls_attention_equals_the_reference(case: tuple[Any, ...]) -> None:
    q, k, scale, mask = case
    bias = reference.mask_as_bias(mask, (*q.shape[:3], q.shape[2]))
    scores = cls_attention(q, k, scale, mask)
    assert bool(torch.isfinite(scores).all())
    # A CLS token that may attend to nothing has no scores; the other images' must be right.
    some = torch.from_numpy((bias[:, :, 0] > -np.inf).any(-1).all(-1))
    slow_scores = reference.cls_attention(q, k, scale, mask)
    torch.testing.assert_close(scores.double()[some], slow_scores[some], rtol=1e-5, atol=1e-7)


@slow
@given(inputs())
def test_mean_keys_equals_the_reference(case: tuple[Any, ...]) -> None:
    k = case[1]
    keys = mean_keys(k)
    assert keys.dtype == torch.float32
    torch.testing.assert_close(keys.double(), reference.mean_keys(k), rtol=1e-6, atol=1e-6)


@both
def test_every_query_gives_one(kind: str) -> None:
    q, k = example()
    torch.testing.assert_close(SCORES[kind](q, k, 0.3).sum(-1), torch.ones(2))


def test_by_hand() -> None:
    q = torch.zeros(1, 1, 4, 1)
    k = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 1, 4, 1)
    # Queries of zero attend to all alike, unless the mask says otherwise.
    torch.testing.assert_close(cls_attention(q, k, 1.0), torch.full((1, 4), 0.25))
    torch.testing.assert_close(received_attention(q, k, 1.0), torch.full((1, 4), 0.25))
    seen = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    torch.testing.assert_close(cls_attention(q, k, 1.0, seen), torch.tensor([[0.5, 0.5, 0, 0]]))
    received = torch.tensor([[0.75, 0.75, 0.25, 1.25]]) / 3
    torch.testing.assert_close(received_attention(q, k, 1.0, seen), received)


@pytest.mark.parametrize("chunk", [1, 7, 18, 19, 20, 500])
def test_chunk_size_changes_nothing(chunk: int) -> None:
    q, k = example()
    mask = torch.rand(2, 1, 19, 19, generator=torch.Generator().manual_seed(1)) > 0.3
    for given_ in (None, mask):
        torch.testing.assert_close(
            received_attention(q, k, 0.3, given_, chunk=chunk),
            received_attention(q, k, 0.3, given_),
            rtol=1e-6,
            atol=1e-7,
        )


# --- masks ------------------------------------------------------------------------------------


def closing(allowed: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "bool":
        return allowed
    dtype = torch.bfloat16 if kind == "bf16-lowest" else torch.float32
    value = -torch.inf if kind == "-inf" else torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, value)


@both
@pytest.mark.parametrize("mask_kind", ["bool", "-inf", "lowest", "bf16-lowest"])
def test_padding_counts_for_nothing(kind: str, mask_kind: str) -> None:
    """An image of 12 tokens padded to 19 gets the scores of the 12 alone."""
    q, k = example()
    short = SCORES[kind](q[1:, :, :12], k[1:, :, :12], 0.3)
    real = torch.ones(2, 19, dtype=torch.bool)
    real[1, 12:] = False
    mask = closing((real[:, None, :, None] & real[:, None, None, :]), mask_kind)
    scores = SCORES[kind](q, k, 0.3, mask)
    torch.testing.assert_close(scores[1:, :12], short, rtol=1e-6, atol=1e-7)
    assert torch.equal(scores[1, 12:], torch.zeros(7))
    whole = SCORES[kind](q[:1], k[:1], 0.3)
    torch.testing.assert_close(scores[:1], whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mask_kind", ["bool", "-inf", "lowest"])
def test_received_attention_of_an_empty_image_is_zero(mask_kind: str) -> None:
    q, k = example()
    allowed = torch.ones(2, 1, 19, 19, dtype=torch.bool)
    allowed[1] = False
    scores = received_attention(q, k, 0.3, closing(allowed, mask_kind))
    assert torch.equal(scores[1], torch.zeros(19))
    torch.testing.assert_close(scores[:1], received_attention(q[:1], k[:1], 0.3))


@both
def test_windows_do_not_see_each_other(kind: str) -> None:
    """Block-diagonal attention, one block an image, equals the images one by one."""
    q, k = example(batch=1, tokens=20)
    block = torch.arange(20) // 5
    scores = SCORES[kind](q, k, 0.3, block[:, None] == block[None, :])
    parts = [SCORES[kind](q[:, :, i : i + 5], k[:, :, i : i + 5], 0.3) for i in (0, 5, 10, 15)]
    expected = torch.cat(parts, -1)
    if kind == "cls":
        expected[:, 5:] = 0.0
    else:
        expected = expected / 4
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)


# --- dtypes and large values ------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_is_computed_in_float32(kind: str, dtype: torch.dtype, masked: bool) -> None:
    q, k = (tensor.to(dtype) for tensor in example(tokens=60, width=64))
    mask = None
    if masked:
        allowed = torch.rand(2, 1, 60, 60, generator=torch.Generator().manual_seed(3)) > 0.5
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(2, 1, 60, 60, dtype=dtype).masked_fill(~allowed, lowest)
    assert_scores(kind, SCORES[kind](q, k, 0.125, mask), q, k, 0.125, mask)
    keys = mean_keys(k)
    assert keys.dtype == torch.float32
    torch.testing.assert_close(keys.double(), reference.mean_keys(k), rtol=1e-6, atol=1e-6)


@both
def test_autocast_changes_nothing(kind: str) -> None:
    q, k = example(tokens=60, width=64)
    plain, plain_keys = SCORES[kind](q, k, 0.125), mean_keys(k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, keys = SCORES[kind](q, k, 0.125), mean_keys(k)
    assert torch.equal(scores, plain)
    assert torch.equal(keys, plain_keys)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_beyond_float16(kind: str, dtype: torch.dtype) -> None:
    """Products of up to 131072, twice what float16 holds; small integers, so they are exact."""
    generator = torch.Generator().manual_seed(4)
    q, k = (64 * torch.randint(-1, 2, (2, 1, 2, 9, 64), generator=generator)).to(dtype)
    k[:, :, 2] = q[:, :, 0]
    scores = SCORES[kind](q, k, 0.125)
    assert bool(torch.isfinite(scores).all())
    assert_scores(kind, scores, q, k, 0.125)


def test_float16_keys_do_not_overflow_in_the_mean() -> None:
    k = torch.full((1, 16, 3, 4), 6e4, dtype=torch.float16)
    assert torch.equal(mean_keys(k), torch.full((1, 3, 4), 6e4).half().float())


@both
def test_row_of_a_batch_equals_the_image_alone(kind: str) -> None:
    q, k = example(batch=4)
    scores = SCORES[kind](q, k, 0.3)
    for b in range(4):
        alone = SCORES[kind](q[b : b + 1], k[b : b + 1], 0.3)
        torch.testing.assert_close(scores[b : b + 1], alone, rtol=1e-6, atol=1e-7)


@both
def test_strides_do_not_matter_and_inputs_are_not_written_to(kind: str) -> None:
    """q and k come as [B,N,H,d] transposed from the towers."""
    q, k = example()
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k)]
    before = [tensor.clone() for tensor in strided]
    scores = SCORES[kind](*strided, 0.3)
    torch.testing.assert_close(scores, SCORES[kind](q, k, 0.3), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(strided, before, strict=True))


# --- cost -------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation makes; the inputs' own do not count."""

    def __init__(self, *given_: torch.Tensor) -> None:
        super().__init__()
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in given_}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.inputs:
                    self.bytes = max(self.bytes, storage.nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_shape", [None, (1, 1, 1, 2000), (1, 1, 2000, 2000)], ids=str)
def test_received_attention_never_holds_all_pairs(
    dtype: torch.dtype, mask_shape: tuple[int, ...] | None
) -> None:
    heads, tokens, chunk = 2, 2000, 128
    q, k = (t.to(dtype) for t in example(batch=1, heads=heads, tokens=tokens))
    mask = None if mask_shape is None else torch.ones(mask_shape, dtype=torch.bool)
    inputs_ = [q, k] if mask is None else [q, k, mask]
    with LargestTensor(*inputs_) as seen:
        received_attention(q, k, 0.3, mask, chunk=chunk)
    assert 0 < seen.bytes <= 4 * heads * chunk * tokens
    assert seen.bytes < tokens * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_shape", [None, (1, 1, 1, 2000), (1, 1, 2000, 2000)], ids=str)
def test_cls_attention_is_linear_in_the_tokens(
    dtype: torch.dtype, mask_shape: tuple[int, ...] | None
) -> None:
    heads, tokens, width = 2, 2000, 8
    q, k = (t.to(dtype) for t in example(batch=1, heads=heads, tokens=tokens, width=width))
    mask = None if mask_shape is None else torch.ones(mask_shape, dtype=torch.bool)
    inputs_ = [q, k] if mask is None else [q, k, mask]
    with LargestTensor(*inputs_) as seen:
        cls_attention(q, k, 0.3, mask)
    assert 0 < seen.bytes <= 4 * heads * tokens * width
    with FlopCounterMode(display=False) as counter:
        cls_attention(q, k, 0.3, mask)
    assert counter.get_total_flops() <= 2 * heads * tokens * width


# --- compile, gradients -----------------------------------------------------------------------


@both
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_graph_breaks(kind: str, masked: bool) -> None:
    torch.compiler.reset()
    q, k = example()
    mask = torch.rand(2, 1, 19, 19, generator=torch.Generator().manual_seed(5)) > 0.3
    compiled = torch.compile(SCORES[kind], fullgraph=True, backend="aot_eager")
    args = (q, k, 0.3, mask) if masked else (q, k, 0.3)
    torch.testing.assert_close(compiled(*args), SCORES[kind](*args), rtol=1e-6, atol=1e-7)
    torch.compiler.reset()


@both
def test_nothing_of_size_n_by_n_is_kept_for_a_backward_pass(kind: str) -> None:
    """With a tower in training, autograd must not gather the chunks that were thrown away."""
    tokens, kept = 600, []
    q, k = (t.requires_grad_() for t in example(batch=1, heads=2, tokens=tokens))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        SCORES[kind](q, k, 0.3)
    assert sum(kept) < tokens * tokens


# --- bad input --------------------------------------------------------------------------------

Q, K = example()
BAD: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "q-3d": ((Q[0], K, 0.3), ["q", "3, 19, 8"]),
    "k-3d": ((Q, K[0], 0.3), ["k", "3, 19, 8"]),
    "tokens": ((Q, K[:, :, :18], 0.3), ["2, 3, 18, 8"]),
    "width": ((Q, K[..., :7], 0.3), ["2, 3, 19, 7"]),
    "heads": ((Q, K[:, :1], 0.3), ["2, 1, 19, 8"]),
    "batch": ((Q, K[:1], 0.3), ["1, 3, 19, 8"]),
    "mask-shape": ((Q, K, 0.3, torch.ones(2, 1, 5, 5, dtype=torch.bool)), ["mask", "2, 1, 5, 5"]),
    "mask-int": ((Q, K, 0.3, torch.ones(19, 19, dtype=torch.int64)), ["mask", "int64"]),
}


@both
@pytest.mark.parametrize("case", BAD)
def test_bad_input(kind: str, case: str) -> None:
    given_, words = BAD[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        SCORES[kind](*given_)
    for word in words:
        assert caught.match(word)


@pytest.mark.parametrize("chunk", [0, -1])
def test_bad_chunk(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk.*{chunk}"):
        received_attention(Q, K, 0.3, chunk=chunk)
