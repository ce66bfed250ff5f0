"""zip_tokens against the slow reference, and what must hold for it whatever the values."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from vlmzip import VisionZip, zip_tokens
from vlmzip.attention import cls_attention, mean_keys, received_attention

PAPER_BUDGETS = [(27, 5), (54, 10), (108, 20), (162, 30)]
MERGES = ["reference", "average"]
ORDERS = ["grouped", "raster"]
slow = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])


# --- inputs -----------------------------------------------------------------------------------


def floats(limit: float) -> st.SearchStrategy[float]:
    # Below 1e-3 the square of a key underflows towards nothing; the zero key has its own test.
    return st.floats(-limit, limit, width=32).map(lambda x: x if abs(x) >= 1e-3 else 0.0)


def arrays(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.float32, shape, elements=elements).map(torch.from_numpy)


@st.composite
def inputs(draw: st.DrawFn, keys: str = "any") -> tuple[Any, ...]:
    """hidden, scores, keys and settings; keys "exact" have cosines without rounding in float32."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 22))
    dominant = draw(st.integers(1, tokens))
    contextual = draw(st.integers(0, tokens - dominant))
    hidden = draw(arrays((batch, tokens, draw(st.integers(1, 5))), floats(8)))
    few = st.sampled_from([0.0, 0.25, 0.5])
    scores = draw(arrays((batch, tokens), draw(st.sampled_from([floats(1), few]))))
    if keys == "exact":
        # Four entries of +-1, +-2 or 0: the norm is a power of two or the key is one-hot or zero.
        signs = draw(arrays((batch, tokens, 4), st.sampled_from([-1.0, 1.0])))
        shape = (batch, tokens, 1)
        hot = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 3)).map(torch.from_numpy))
        one_hot = torch.zeros_like(signs).scatter(2, hot, 1.0) * signs
        size = draw(arrays(shape, st.sampled_from([0.0, 0.5, 1.0, 4.0])))
        keys_BNd = torch.where(draw(arrays(shape, st.booleans().map(float))) > 0, signs, one_hot)
        keys_BNd = keys_BNd * size
    else:
        keys_BNd = draw(arrays((batch, tokens, draw(st.integers(1, 5))), floats(4)))
    chosen = {
        "dominant": dominant,
        "contextual": contextual,
        "cls_token": draw(st.booleans()),
        "merge": draw(st.sampled_from(MERGES)),
        "order": draw(st.sampled_from(ORDERS)),
    }
    return hidden, scores, keys_BNd, chosen


def example(
    batch: int = 2, tokens: int = 33, width: int = 8, head: int = 6, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, width, generator=generator)
    scores = torch.randn(batch, tokens, generator=generator).softmax(-1)
    return hidden, scores, torch.randn(batch, tokens, head, generator=generator)


def same_indices(a: Any, b: Any) -> bool:
    return (
        torch.equal(a.dominant, b.dominant)
        and torch.equal(a.contextual, b.contextual)
        and torch.equal(a.assignment, b.assignment)
    )


# --- parity -----------------------------------------------------------------------------------


@slow
@given(inputs())
def test_equals_the_reference(case: tuple[Any, ...]) -> None:
    hidden, scores, keys, chosen = case
    out = zip_tokens(hidden, scores, keys, **chosen)
    reference.assert_same_zip(out, hidden, scores, keys, **chosen)


@slow
@given(inputs(keys="exact"))
def test_ties_go_to_the_lower_index(case: tuple[Any, ...]) -> None:
    hidden, scores, keys, chosen = case
    out = zip_tokens(hidden, scores, keys, **chosen)
    reference.assert_same_zip(out, hidden, scores, keys, exact=True, **chosen)


@pytest.fixture(scope="module")
def clip_layer() -> dict[str, Any]:
    """One image through a layer of CLIP-L/336's size: 577 tokens, 16 heads of 64, 1024 wide."""
    generator = torch.Generator().manual_seed(577)
    q = torch.randn(1, 16, 577, 64, generator=generator)
    k = torch.randn(1, 16, 577, 64, generator=generator)
    hidden = torch.randn(1, 577, 1024, generator=generator)
    return {
        "hidden": hidden,
        "scores": {True: cls_attention(q, k, 0.125), False: received_attention(q, k, 0.125)},
        "slow_scores": {
            True: reference.cls_attention(q, k, 0.125),
            False: reference.received_attention(q, k, 0.125),
        },
        "keys": mean_keys(k),
        "slow_keys": reference.mean_keys(k),
    }


@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no-cls"])
def test_scores_and_keys_at_clip_size(clip_layer: dict[str, Any], cls_token: bool) -> None:
    scores, slow_scores = clip_layer["scores"][cls_token], clip_layer["slow_scores"][cls_token]
    # Scores are about 1/577: an absolute 1e-5 would say little about them.
    torch.testing.assert_close(scores.double(), slow_scores, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(clip_layer["keys"].double(), clip_layer["slow_keys"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize("budget", PAPER_BUDGETS, ids=str)
def test_paper_budgets_at_clip_size(
    clip_layer: dict[str, Any], budget: tuple[int, int], cls_token: bool
) -> None:
    hidden, scores, keys = clip_layer["hidden"], clip_layer["scores"][cls_token], clip_layer["keys"]
    # Each merge and each order once; all four pairs are covered by the generated cases.
    for merge, order in zip(MERGES, ORDERS, strict=True):
        chosen = {
            "dominant": budget[0],
            "contextual": budget[1],
            "cls_token": cls_token,
            "merge": merge,
            "order": order,
        }
        out = zip_tokens(hidden, scores, keys, **chosen)
        assert out.tokens.shape == (1, sum(budget), 1024)
        reference.assert_same_zip(out, hidden, scores, keys, **chosen)


@pytest.mark.parametrize(
    ("budget", "step", "last"),
    [((27, 5), 110, 440), ((54, 10), 52, 468), ((108, 20), 23, 437), ((162, 30), 13, 377)],
    ids=str,
)
def test_target_geometry_of_the_paper(
    clip_layer: dict[str, Any], budget: tuple[int, int], step: int, last: int
) -> None:
    out = zip_tokens(
        clip_layer["hidden"],
        clip_layer["scores"][True],
        clip_layer["keys"],
        dominant=budget[0],
        contextual=budget[1],
    )
    stay = set(out.dominant[0].tolist())
    assert 0 in stay
    rest = [j for j in range(577) if j not in stay]
    places = [rest.index(j) for j in out.contextual[0].tolist()]
    assert places == list(range(0, last + 1, step))


def test_defaults_are_the_paper_at_64_tokens(clip_layer: dict[str, Any]) -> None:
    hidden, scores, keys = clip_layer["hidden"], clip_layer["scores"][True], clip_layer["keys"]
    chosen = {"cls_token": True, "merge": "reference", "order": "grouped"}
    spelled = zip_tokens(hidden, scores, keys, dominant=54, contextual=10, **chosen)
    short = zip_tokens(hidden, scores, keys, dominant=54, contextual=10)
    assert same_indices(short, spelled)
    assert torch.equal(short.tokens, spelled.tokens)


def test_by_hand() -> None:
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [16.0], [32.0], [64.0]]])
    scores = torch.tensor([[9.0, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1]])
    east, north = [1.0, 0.0], [0.0, 3.0]
    keys = torch.tensor([[east, east, east, north, north, east, north]])
    # Stay: 0 (CLS) and 2. Rest: 1 3 4 5 6, step 2, targets 1 and 4. 5 -> 1; 3 and 6 -> 4.
    out = zip_tokens(hidden, scores, keys, dominant=2, contextual=2)
    assert out.tokens.flatten().tolist() == [1, 4, 2 + 32, 16 + (8 + 64) / 2]
    assert out.dominant.tolist() == [[0, 2]]
    assert out.contextual.tolist() == [[1, 4]]
    assert out.assignment.tolist() == [[0, 2, 1, 3, 3, 2, 3]]
    out = zip_tokens(hidden, scores, keys, dominant=2, contextual=2, merge="average", order="raster")
    assert out.tokens.flatten().tolist() == [1, (2 + 32) / 2, 4, pytest.approx((16 + 8 + 64) / 3)]
    assert out.assignment.tolist() == [[0, 1, 2, 3, 3, 1, 3]]


# --- the ends of the range --------------------------------------------------------------------


@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("tokens", "dominant", "contextual"),
    [
        (12, 12, 0),  # all stay
        (12, 7, 5),  # all stay, five of them as targets
        (12, 1, 11),
        (12, 3, 1),  # one target
        (12, 3, 0),  # nothing to merge into
        (12, 1, 0),
        (1, 1, 0),
        (2, 1, 1),
        (13, 3, 6),  # step 1, a tail without targets
    ],
)
def test_ends_of_the_range(
    tokens: int, dominant: int, contextual: int, merge: str, order: str, cls_token: bool
) -> None:
    hidden, scores, keys = example(tokens=tokens)
    chosen = {
        "dominant": dominant,
        "contextual": contextual,
        "cls_token": cls_token,
        "merge": merge,
        "order": order,
    }
    out = zip_tokens(hidden, scores, keys, **chosen)
    reference.assert_same_zip(out, hidden, scores, keys, **chosen)
    if dominant + contextual == tokens and order == "raster":
        assert torch.equal(out.tokens, hidden)
    if contextual == 0:
        assert out.contextual.shape == (2, 0)
        assert int((out.assignment < 0).sum()) == 2 * (tokens - dominant)


@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no-cls"])
def test_equal_scores_keep_the_first_tokens(cls_token: bool) -> None:
    # 2000 equal scores: an unstable sort does not survive this.
    hidden, _, keys = example(batch=1, tokens=2000)
    out = zip_tokens(
        hidden, torch.full((1, 2000), 0.5), keys, dominant=300, contextual=7, cls_token=cls_token
    )
    assert out.dominant[0].tolist() == list(range(300))


def test_cls_stays_with_the_lowest_score_and_its_score_counts_for_nothing() -> None:
    hidden, scores, keys = example()
    outs = []
    for value in (-5.0, 0.0, 5.0):
        changed = scores.clone()
        changed[:, 0] = value
        outs.append(zip_tokens(hidden, changed, keys, dominant=6, contextual=3, cls_token=True))
    assert all(int(out.dominant[0, 0]) == 0 for out in outs)
    assert same_indices(outs[0], outs[1])
    assert same_indices(outs[0], outs[2])


def test_negative_scores_and_signed_zero() -> None:
    hidden, _, keys = example(batch=1, tokens=6)
    scores = torch.tensor([[-3.0, -0.0, 0.0, -1.0, 0.0, -2.0]])
    out = zip_tokens(hidden, scores, keys, dominant=4, contextual=1, cls_token=False)
    assert out.dominant[0].tolist() == [1, 2, 3, 4]
    out = zip_tokens(hidden, scores, keys, dominant=2, contextual=1, cls_token=False)
    assert out.dominant[0].tolist() == [1, 2]


@pytest.mark.parametrize("merge", MERGES)
def test_zero_keys_go_to_the_first_target(merge: str) -> None:
    hidden, scores, keys = example()
    keys = torch.zeros_like(keys)
    chosen = {"dominant": 5, "contextual": 4, "cls_token": True, "merge": merge}
    out = zip_tokens(hidden, scores, keys, **chosen)
    reference.assert_same_zip(out, hidden, scores, keys, exact=True, **chosen)
    assert bool(torch.isfinite(out.tokens).all())


def test_zero_target_is_nearer_than_an_opposite_one() -> None:
    hidden = torch.arange(4.0).reshape(1, 4, 1)
    keys = torch.tensor([[[1.0], [-1.0], [0.0], [2.0]]])
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    # Rest 1 2 3, targets 1 (cosine -1) and 2 (a zero key, cosine 0).
    out = zip_tokens(hidden, scores, keys, dominant=1, contextual=2)
    assert out.assignment.tolist() == [[0, 1, 2, 2]]


@pytest.mark.parametrize("merge", MERGES)
def test_empty_groups_hold_the_bare_target(merge: str) -> None:
    hidden, scores, _ = example(batch=1, tokens=12)
    keys = torch.zeros(1, 12, 2)
    keys[..., 0] = 1.0
    out = zip_tokens(hidden, scores, keys, dominant=2, contextual=3, merge=merge)
    empty = out.contextual[0, 1:]
    assert torch.equal(out.tokens[0, 3:], hidden[0, empty])


# --- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize(
    ("dtype", "ulp"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=["bf16", "fp16"]
)
def test_half_precision(dtype: torch.dtype, ulp: float, cls_token: bool, merge: str) -> None:
    hidden, scores, keys = example(batch=1, tokens=600, width=16, head=64, seed=3)
    # Positive, so that sums do not cancel; keys close to each other, so that their last bits count.
    hidden, keys = (1 + hidden.abs()).to(dtype), (1 + 0.1 * keys).to(dtype)
    chosen = {"dominant": 20, "contextual": 20, "cls_token": cls_token, "merge": merge}
    out = zip_tokens(hidden, scores, keys, **chosen)
    assert out.tokens.dtype == dtype
    assert out.assignment.dtype == out.dominant.dtype == out.contextual.dtype == torch.int64
    # Room for two roundings of half an ulp, of the mean and of the sum.
    reference.assert_same_zip(out, hidden, scores, keys, rtol=ulp, atol=0.0, **chosen)


def test_half_precision_ties() -> None:
    """Keys that differ in float32 but not in bf16 tie, and go to the lower target."""
    hidden, scores, _ = example(batch=1, tokens=8)
    keys = torch.tensor([1.0, 0.0]).repeat(1, 8, 1)
    keys[0, 4:, 1] = 2.0**-20
    scores = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    apart = zip_tokens(hidden, scores, keys * torch.tensor([1.0, 2.0**18]), dominant=1, contextual=2)
    assert apart.assignment[0].tolist() == [0, 1, 1, 1, 2, 2, 2, 2]
    tied = zip_tokens(hidden.bfloat16(), scores, torch.ones(1, 8, 2).bfloat16(), dominant=1, contextual=2)
    assert tied.assignment[0].tolist() == [0, 1, 1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merge", MERGES)
def test_autocast_changes_nothing(dtype: torch.dtype, merge: str) -> None:
    hidden, scores, keys = example(batch=2, tokens=300, width=16, head=64, seed=4)
    hidden, keys = hidden.to(dtype), keys.to(dtype)
    chosen = {"dominant": 20, "contextual": 10, "merge": merge}
    plain = zip_tokens(hidden, scores, keys, **chosen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = zip_tokens(hidden, scores, keys, **chosen)
    assert same_indices(out, plain)
    assert out.tokens.dtype == dtype
    assert torch.equal(out.tokens, plain.tokens)


def test_dominant_tokens_pass_bit_for_bit() -> None:
    hidden, scores, keys = example(seed=5)
    hidden = hidden * 1e4 + 1e-3
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = zip_tokens(hidden.to(dtype), scores, keys, dominant=6, contextual=3)
        for b in range(2):
            assert torch.equal(out.tokens[b, :6], hidden.to(dtype)[b, out.dominant[b]])


def test_half_precision_sums_do_not_overflow() -> None:
    """A group's sum passes float16's largest number; its mean does not."""
    hidden = torch.full((1, 100, 2), 3e4, dtype=torch.float16)
    _, scores, keys = example(batch=1, tokens=100)
    out = zip_tokens(hidden, scores, keys, dominant=2, contextual=1, merge="average")
    assert torch.equal(out.tokens, torch.full((1, 3, 2), 3e4, dtype=torch.float16))


# --- as a method --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("given_", "k", "parts"),
    [
        ({"tokens": 17}, 17, (14, 3)),
        ({"dominant": 10, "contextual": 7}, 17, (10, 7)),
        ({"dominant": 10, "contextual": 7}, 12, (10, 2)),
        ({"dominant": 17, "contextual": 0}, 17, (17, 0)),
        ({"keep": 0.5}, 18, (15, 3)),
        ({"total_tokens": 64}, 32, (27, 5)),
        ({"tokens": 1}, 1, (1, 0)),
    ],
    ids=str,
)
def test_method_equals_the_reference(
    given_: dict[str, Any],
    k: int,
    parts: tuple[int, int],
    merge: str,
    order: str,
    cls_token: bool,
) -> None:
    hidden, scores, keys = example(tokens=35 + cls_token)
    method = VisionZip(**given_, merge=merge, order=order)
    out = method(hidden, scores, keys, (5, 7), k, cls_token)
    chosen = {"cls_token": cls_token, "merge": merge, "order": order}
    assert out.tokens.shape == (2, k, 8)
    reference.assert_same_zip(out, hidden, scores, keys, dominant=parts[0], contextual=parts[1], **chosen)


@pytest.mark.parametrize("given_", [{"tokens": 36}, {"dominant": 30, "contextual": 6}], ids=str)
@pytest.mark.parametrize("order", [*ORDERS, None])
def test_method_passes_all_tokens_untouched(given_: dict[str, Any], order: str | None) -> None:
    hidden, scores, keys = example(tokens=36)
    out = VisionZip(**given_, order=order)(hidden, scores, keys, (5, 7), 36, True)
    assert torch.equal(out.tokens, hidden)
    assert torch.equal(out.assignment, torch.arange(36).expand(2, 36))


@pytest.mark.parametrize("k", [0, -1, 37])
def test_method_refuses_counts_that_do_not_fit(k: int) -> None:
    hidden, scores, keys = example(tokens=36)
    with pytest.raises(ValueError, match=rf"{k}.*36"):
        VisionZip(tokens=8)(hidden, scores, keys, (5, 7), k, True)


# --- what must hold whatever the values -------------------------------------------------------


@slow
@given(inputs())
def test_assignment_is_a_partition(case: tuple[Any, ...]) -> None:
    hidden, scores, keys, chosen = case
    out = zip_tokens(hidden, scores, keys, **chosen)
    batch = len(scores)
    kept = chosen["dominant"] + chosen["contextual"]
    assert out.tokens.shape == (batch, kept, hidden.shape[2])
    assert out.dominant.shape == (batch, chosen["dominant"])
    assert out.contextual.shape == (batch, chosen["contextual"])
    for b in range(batch):
        stay, targets = out.dominant[b].tolist(), out.contextual[b].tolist()
        order = stay + targets if chosen["order"] == "grouped" else sorted(stay + targets)
        assert [int(out.assignment[b, j]) for j in order] == list(range(kept))
        assert stay == sorted(stay)
        assert targets == sorted(targets)
        assert len({*stay, *targets}) == kept
        rows = [int(row) for row in out.assignment[b]]
        assert all(rows.count(rows[j]) == 1 for j in stay)
        assert all(row >= 0 for row in rows) or not targets


@pytest.mark.parametrize("power", [-30, -3, 5, 30])
def test_length_of_a_key_counts_for_nothing(power: int) -> None:
    hidden, scores, keys = example()
    chosen = {"dominant": 6, "contextual": 4}
    plain = zip_tokens(hidden, scores, keys, **chosen)
    # Powers of two, so that normalising gives the same bits.
    all_scaled = zip_tokens(hidden, scores, keys * 2.0**power, **chosen)
    assert same_indices(all_scaled, plain)
    sizes = 2.0 ** (torch.arange(33) % 7 - 3)
    each_scaled = zip_tokens(hidden, scores, keys * sizes[None, :, None], **chosen)
    assert same_indices(each_scaled, plain)


def test_only_the_order_of_scores_counts() -> None:
    hidden, scores, keys = example()
    plain = zip_tokens(hidden, scores, keys, dominant=6, contextual=4)
    for changed in (scores * 2.0**-20, scores * 2.0**20, scores.log(), scores - 7.0):
        assert same_indices(zip_tokens(hidden, changed, keys, dominant=6, contextual=4), plain)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("order", ORDERS)
def test_row_of_a_batch_equals_the_image_alone(merge: str, order: str) -> None:
    hidden, scores, keys = example(batch=5, tokens=65, width=16, head=16)
    chosen = {"dominant": 9, "contextual": 5, "merge": merge, "order": order}
    out = zip_tokens(hidden, scores, keys, **chosen)
    for b in range(5):
        row = slice(b, b + 1)
        alone = zip_tokens(hidden[row], scores[row], keys[row], **chosen)
        assert torch.equal(alone.dominant, out.dominant[row])
        assert torch.equal(alone.contextual, out.contextual[row])
        assert torch.equal(alone.assignment, out.assignment[row])
        torch.testing.assert_close(alone.tokens, out.tokens[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merge", MERGES)
def test_orders_hold_the_same_tokens(merge: str) -> None:
    hidden, scores, keys = example()
    chosen = {"dominant": 6, "contextual": 4, "merge": merge}
    grouped = zip_tokens(hidden, scores, keys, order="grouped", **chosen)
    raster = zip_tokens(hidden, scores, keys, order="raster", **chosen)
    for b in range(2):
        place = torch.cat([grouped.dominant[b], grouped.contextual[b]])
        assert torch.equal(raster.tokens[b], grouped.tokens[b, place.argsort()])


def test_permuting_patches_moves_the_dominant_ones_along() -> None:
    hidden, scores, keys = example(seed=8)
    moved = torch.randperm(33, generator=torch.Generator().manual_seed(8))
    chosen = {"dominant": 6, "contextual": 0, "cls_token": False}
    plain = zip_tokens(hidden, scores, keys, **chosen)
    out = zip_tokens(hidden[:, moved], scores[:, moved], keys[:, moved], **chosen)
    assert torch.equal(moved[out.dominant].sort(-1).values, plain.dominant)


def test_permuting_channels_of_hidden_permutes_the_output() -> None:
    hidden, scores, keys = example()
    moved = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    plain = zip_tokens(hidden, scores, keys, dominant=6, contextual=4)
    out = zip_tokens(hidden[..., moved], scores, keys, dominant=6, contextual=4)
    torch.testing.assert_close(out.tokens, plain.tokens[..., moved], rtol=1e-6, atol=1e-6)


def test_equal_tokens_show_the_two_merges() -> None:
    """Averaging equal tokens gives the token; the released code's merge gives it twice."""
    _, scores, keys = example()
    hidden = torch.full((2, 33, 3), 5.0)
    average = zip_tokens(hidden, scores, keys, dominant=6, contextual=2, merge="average")
    torch.testing.assert_close(average.tokens, torch.full((2, 8, 3), 5.0))
    summed = zip_tokens(hidden, scores, keys, dominant=6, contextual=2, merge="reference")
    torch.testing.assert_close(summed.tokens[:, 6:], torch.full((2, 2, 3), 10.0))
    torch.testing.assert_close(summed.tokens[:, :6], torch.full((2, 6, 3), 5.0))


def test_inputs_are_not_written_to_and_strides_do_not_matter() -> None:
    hidden, scores, keys = example()
    before = hidden.clone(), scores.clone(), keys.clone()
    plain = zip_tokens(hidden, scores, keys, dominant=6, contextual=4)
    for given_, kept in zip((hidden, scores, keys), before, strict=True):
        assert torch.equal(given_, kept)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (hidden, scores, keys)]
    out = zip_tokens(*strided, dominant=6, contextual=4)
    assert same_indices(out, plain)
    torch.testing.assert_close(out.tokens, plain.tokens, rtol=1e-6, atol=1e-6)
    one = zip_tokens(
        hidden[:1].expand(3, -1, -1),
        scores[:1].expand(3, -1),
        keys[:1].expand(3, -1, -1),
        dominant=6,
        contextual=4,
    )
    torch.testing.assert_close(one.tokens[2:], plain.tokens[:1], rtol=1e-6, atol=1e-6)


def test_the_same_twice_and_in_inference_mode() -> None:
    hidden, scores, keys = example()
    first = zip_tokens(hidden, scores, keys, dominant=6, contextual=4)
    with torch.inference_mode():
        second = zip_tokens(hidden, scores, keys, dominant=6, contextual=4)
    assert same_indices(first, second)
    assert torch.equal(first.tokens, second.tokens)


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("contextual", [0, 4])
def test_gradients_flow_through_the_tokens_alone(merge: str, order: str, contextual: int) -> None:
    hidden, scores, keys = (t.requires_grad_() for t in example())
    chosen: dict[str, Any] = {
        "dominant": 6,
        "contextual": contextual,
        "cls_token": True,
        "merge": merge,
        "order": order,
    }
    out = zip_tokens(hidden, scores, keys, **chosen)
    upstream = torch.randn(out.tokens.shape, generator=torch.Generator().manual_seed(2))
    out.tokens.backward(upstream)
    assert scores.grad is None
    assert keys.grad is None
    # The tokens are linear in hidden: sending unit vectors through the reference reads the weights.
    units = torch.eye(33).expand(2, 33, 33)
    weights_BKN = reference.zip_tokens(units, scores, keys, assignment=out.assignment, **chosen).tokens
    assert hidden.grad is not None
    torch.testing.assert_close(
        hidden.grad.double(), weights_BKN.transpose(1, 2) @ upstream.double(), rtol=1e-5, atol=1e-6
    )


def test_gradients_are_finite_with_zero_keys_and_half_precision() -> None:
    hidden, scores, keys = example()
    hidden = hidden.bfloat16().requires_grad_()
    zip_tokens(hidden, scores, torch.zeros_like(keys), dominant=6, contextual=4).tokens.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert bool(torch.isfinite(hidden.grad).all())


# --- torch.compile ----------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("contextual", "cls_token", "merge", "order"),
    [
        (4, True, "reference", "grouped"),
        (4, False, "average", "raster"),
        (0, True, "average", "raster"),
    ],
)
def test_compiles_without_graph_breaks(contextual: int, cls_token: bool, merge: str, order: str) -> None:
    chosen: dict[str, Any] = {
        "dominant": 6,
        "contextual": contextual,
        "cls_token": cls_token,
        "merge": merge,
        "order": order,
    }

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def compiled(hidden: torch.Tensor, scores: torch.Tensor, keys: torch.Tensor) -> Any:
        out = zip_tokens(hidden, scores, keys, **chosen)
        return out.tokens, out.dominant, out.contextual, out.assignment

    hidden, scores, keys = example()
    eager = zip_tokens(hidden, scores, keys, **chosen)
    tokens, dominant, targets, assignment = compiled(hidden, scores, keys)
    torch.testing.assert_close(tokens, eager.tokens, rtol=1e-6, atol=1e-6)
    assert torch.equal(dominant, eager.dominant)
    assert torch.equal(targets, eager.contextual)
    assert torch.equal(assignment, eager.assignment)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backward", [True, False])
def test_compiled_code_from_q_and_k_to_tokens(backward: bool) -> None:
    """What runs inside a tower. Without the way back through the real compiler, which is slow."""

    def run(hidden: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
        out = zip_tokens(hidden, cls_attention(q, k, 0.5), mean_keys(k), dominant=6, contextual=4)
        return out.tokens, out.assignment

    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(2, 33, 8, generator=generator)
    q, k = torch.randn(2, 2, 3, 33, 6, generator=generator)
    backend = "aot_eager" if backward else "inductor"
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        leaf = hidden.clone().requires_grad_(backward)
        tokens, assignment = function(leaf, q, k)
        if backward:
            tokens.square().sum().backward()
        results.append((tokens.detach(), assignment, leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_serves_every_batch_size() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(hidden: torch.Tensor, scores: torch.Tensor, keys: torch.Tensor) -> Any:
        out = zip_tokens(hidden, scores, keys, dominant=6, contextual=4)
        return out.tokens, out.assignment

    for batch in (2, 3, 5):
        tensors = example(batch=batch, seed=batch)
        eager = zip_tokens(*tensors, dominant=6, contextual=4)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        tokens, assignment = compiled(*tensors)
        torch.testing.assert_close(tokens, eager.tokens, rtol=1e-6, atol=1e-6)
        assert torch.equal(assignment, eager.assignment)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("place", [0, 1, 2], ids=["hidden", "scores", "keys"])
def test_compiled_code_still_refuses_nan(place: int) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden: torch.Tensor, scores: torch.Tensor, keys: torch.Tensor) -> Any:
        return zip_tokens(hidden, scores, keys, dominant=6, contextual=4).tokens

    tensors = [tensor.clone() for tensor in example()]
    compiled(*tensors)
    tensors[place].view(-1)[7] = float("nan")
    with pytest.raises(RuntimeError, match=r"(?i)nan|finite"):
        compiled(*tensors)


# --- bad input --------------------------------------------------------------------------------

N = 9
NAN, INF = float("nan"), float("inf")


def spoiled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[1, 5] = value
    return tensor


HIDDEN, SCORES, KEYS = example(tokens=N, width=4, head=3)
LONG = torch.zeros(2, N, 4, dtype=torch.int64)
# What is given, and what the message must speak of.
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "hidden-2d": ({"hidden": HIDDEN[0]}, ["hidden", f"{N}, 4"]),
    "hidden-4d": ({"hidden": HIDDEN[None]}, ["hidden", f"1, 2, {N}, 4"]),
    "hidden-tokens": ({"hidden": HIDDEN[:, :8]}, ["hidden", "2, 8"]),
    "scores-1d": ({"scores": SCORES[0]}, ["scores", f"{N}"]),
    "scores-3d": ({"scores": SCORES[..., None]}, ["scores", f"2, {N}, 1"]),
    "scores-tokens": ({"scores": SCORES[:, :8]}, ["scores", "2, 8"]),
    "scores-batch": ({"scores": SCORES[:1]}, ["scores", f"1, {N}"]),
    "keys-2d": ({"keys": KEYS[0]}, ["keys", f"{N}, 3"]),
    "keys-heads-left-in": ({"keys": KEYS[:, None]}, ["keys", f"2, 1, {N}, 3"]),
    "keys-tokens": ({"keys": KEYS[:, :8]}, ["keys", "2, 8"]),
    "keys-batch": ({"keys": KEYS[:1]}, ["keys", f"1, {N}"]),
    "no-tokens": (
        {"hidden": HIDDEN[:, :0], "scores": SCORES[:, :0], "keys": KEYS[:, :0]},
        ["0"],
    ),
    "hidden-int": ({"hidden": LONG}, ["hidden", "int64"]),
    "hidden-bool": ({"hidden": LONG.bool()}, ["hidden", "bool"]),
    "hidden-complex": ({"hidden": HIDDEN.to(torch.complex64)}, ["hidden", "complex64"]),
    "scores-int": ({"scores": LONG[..., 0]}, ["scores", "int64"]),
    "keys-int": ({"keys": LONG}, ["keys", "int64"]),
    "hidden-list": ({"hidden": HIDDEN.tolist()}, ["hidden", "list"]),
    "scores-array": ({"scores": SCORES.numpy()}, ["scores", "ndarray"]),
    "keys-none": ({"keys": None}, ["keys", "None"]),
    "hidden-nan": ({"hidden": spoiled(HIDDEN, NAN)}, ["hidden", "nan|finite"]),
    "hidden-inf": ({"hidden": spoiled(HIDDEN, INF)}, ["hidden", "inf|finite"]),
    "scores-nan": ({"scores": spoiled(SCORES, NAN)}, ["scores", "nan|finite"]),
    "scores-inf": ({"scores": spoiled(SCORES, INF)}, ["scores", "inf|finite"]),
    "scores-minus-inf": ({"scores": spoiled(SCORES, -INF)}, ["scores", "inf|finite"]),
    "keys-nan": ({"keys": spoiled(KEYS, NAN)}, ["keys", "nan|finite"]),
    "keys-inf": ({"keys": spoiled(KEYS, -INF)}, ["keys", "inf|finite"]),
    "dominant-0": ({"dominant": 0}, ["dominant", "0"]),
    "dominant-negative": ({"dominant": -1}, ["dominant", "-1"]),
    "dominant-too-many": ({"dominant": 10, "contextual": 0}, ["10", f"{N}"]),
    "dominant-true": ({"dominant": True}, ["dominant", "True"]),
    "dominant-float": ({"dominant": 3.0}, ["dominant", r"3\.0"]),
    "dominant-string": ({"dominant": "3"}, ["dominant", "'3'"]),
    "dominant-none": ({"dominant": None}, ["dominant", "None"]),
    "dominant-tensor": ({"dominant": torch.tensor(3)}, ["dominant", "tensor"]),
    "contextual-negative": ({"contextual": -2}, ["contextual", "-2"]),
    "contextual-false": ({"contextual": False}, ["contextual", "False"]),
    "contextual-float": ({"contextual": 1.5}, ["contextual", r"1\.5"]),
    "contextual-string": ({"contextual": "1"}, ["contextual", "'1'"]),
    "together-too-many": ({"dominant": 5, "contextual": 5}, ["10|5", f"{N}"]),
    "merge-unknown": ({"merge": "mean"}, ["merge", "mean", "reference", "average"]),
    "merge-none": ({"merge": None}, ["merge", "None"]),
    "order-unknown": ({"order": "sorted"}, ["order", "sorted", "grouped", "raster"]),
    "cls-string": ({"cls_token": "no"}, ["cls_token", "no"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    given_, words = BAD[case]
    arguments: dict[str, Any] = {
        "hidden": HIDDEN,
        "scores": SCORES,
        "keys": KEYS,
        "dominant": 4,
        "contextual": 2,
        **given_,
    }
    with pytest.raises((ValueError, TypeError)) as caught:
        zip_tokens(**arguments)
    for word in words:
        assert caught.match(f"(?i){word}")


def test_numpy_integers_are_integers() -> None:
    plain = zip_tokens(HIDDEN, SCORES, KEYS, dominant=4, contextual=2)
    out = zip_tokens(HIDDEN, SCORES, KEYS, dominant=np.int64(4), contextual=np.int32(2))
    assert torch.equal(out.tokens, plain.tokens)
