"""The fused Triton kernels against their torch references, on a CPU through Triton's interpreter.

Collected normally, this file offers one test that starts the others in a process of their own.
"""

from typing import Any

import pytest
import torch

from layers.logits import Filters
from layers.norm_rope import GAIN
from layers.rotary import Rotation
from layers.sampler import NO_TOKEN, gumbel_noise, philox4x32
from memory.kv_cache import KVLayer
from tests.kernels.interpreter import (
    HAS_TRITON,
    INTERPRET,
    interpreted,
    patch_interpreter,
    poisoned_memory,
    run_in_interpreter,
    starts_interpreter,
)
from tests.kernels.references import (
    gate_mul_reference,
    qk_norm_rope_store_reference,
    rms_norm_reference,
)
from tests.layers.tensors import keys
from tests.layers.test_sampler import sample

if INTERPRET and HAS_TRITON:
    from layers.kernels import logit_bounds as bounds
    from layers.kernels.logit_bounds import FEW_ROWS_BLOCK, MANY_ROWS_BLOCK, logit_bounds
    from layers.kernels.rowwise import gain_rows, gate_mul, qk_norm_rope_store, rms_norm
    from layers.kernels.sampling import sample_shard
    from tests.kernels.filters import check_bounds, check_filters, hard_rows

    patch_interpreter()


@starts_interpreter
def test_in_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.mark.slow
@starts_interpreter
def test_in_interpreter_what_is_slow() -> None:
    run_in_interpreter(__file__, "slow")


def _words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """The known-answer vectors that Random123 publishes for philox4x32, 10 rounds."""
    c, k = _words(*counter), _words(*key)
    words = philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1]))
    assert tuple(int(word) for word in words) == expected


def test_noise_is_gumbel_and_splits() -> None:
    seed, position = torch.tensor([7, -3, 2**40]), torch.tensor([0, 5, 9])
    noise = gumbel_noise(keys(seed), position, 40_000)
    assert noise.isfinite().all()
    # Mean: Euler's constant; variance: pi**2 / 6. Five standard errors of 40,000 draws.
    assert (noise.mean(1) - 0.5772).abs().max() < 5 * (1.645 / 40_000) ** 0.5
    assert (noise.var(1) - 1.645).abs().max() < 0.1
    assert torch.equal(noise[:, 20_000:], gumbel_noise(keys(seed), position, 20_000, 20_000))
    assert len({float(row[0]) for row in noise}) == 3


def test_reference_sampler_follows_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]]).expand(20_000, 5)
    seeds = torch.arange(20_000)
    drawn = sample(logits, torch.full((20_000,), 0.7), keys(seeds), torch.zeros_like(seeds))
    share = drawn.bincount(minlength=5) / 20_000
    assert (share - torch.softmax(logits[0] / 0.7, 0)).abs().max() < 0.02
    ties = torch.tensor([[1.0, 3.0, 3.0]])
    one = torch.zeros(1)
    assert sample(ties, one, keys(one.long()), one.long()).tolist() == [1]


@interpreted
@pytest.mark.parametrize("size", [64, 1024, 1536])
def test_norm(size: int) -> None:
    x, residual = torch.randn(2, 3, size, dtype=torch.float32)
    weight = torch.randn(size)
    for part in (None, residual, torch.randn(4, 3, size)):
        with poisoned_memory():
            got = rms_norm(x, weight, 1e-6, part)
        torch.testing.assert_close(got, rms_norm_reference(x, weight, 1e-6, part))
    # The part has a norm of its own first; its weight and eps are others.
    post = torch.randn(size), 0.5
    for part in (residual, torch.randn(4, 3, size)):
        with poisoned_memory():
            got = rms_norm(x, weight, 1e-6, part, post)
        torch.testing.assert_close(got, rms_norm_reference(x, weight, 1e-6, part, post))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gain(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 3, 1000).to(dtype)
    weight = torch.randn(1000).to(dtype)
    for part in (None, residual, torch.randn(2, 3, 1000), torch.randn(4, 3, 1000)):
        with poisoned_memory():
            gained, squares, total = gain_rows(x, weight, part)
        normed, expected = rms_norm_reference(x, weight, 1e-6, part)
        # Triton's interpreter cuts off bfloat16s instead of rounding them.
        about = 2e-2 if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(total, expected, rtol=about, atol=about)
        gain = GAIN[dtype]
        want = (total.float() * weight.float() * gain).to(dtype)
        if part is not None:
            post = weight.float() + 1, 0.5
            with poisoned_memory():
                _, _, other = gain_rows(x, weight, part, post)
            expected = rms_norm_reference(x, weight, 1e-6, part, post)[1]
            torch.testing.assert_close(other, expected, rtol=2e-2, atol=5e-2)
        torch.testing.assert_close(gained, want, rtol=about, atol=about)
        scale = torch.rsqrt(squares[0] / 1000 + 1e-6) / gain
        got = gained.float() * scale[:, None]
        torch.testing.assert_close(got, normed.float(), rtol=2e-2, atol=2e-2)


@interpreted
def test_sums_of_squares_are_a_tree_of_neighbours() -> None:
    """In this order 2**24 + 1 + 1 is 2**24 + 2: with the large square first, the ones are lost."""
    x = torch.zeros(1, 8)
    x[0, [0, 2, 3]] = torch.tensor([4096.0, 1.0, 1.0])
    _, squares, _ = gain_rows(x.bfloat16(), torch.ones(8).bfloat16())
    assert squares.tolist() == [[2.0**24 + 2]]


@interpreted
@pytest.mark.parametrize("summands", [1, 3, 8])
def test_summands_of_a_product_are_two_or_four(summands: int) -> None:
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match=f"2 or 4 summands, got {summands}"):
        rms_norm(x, x[0], 1e-6, torch.zeros(summands, 2, 16))


@interpreted
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gate_mul(gate: str) -> None:
    x = 3 * torch.randn(3, 2 * 1500)
    with poisoned_memory():
        got = gate_mul(x, gate)
    torch.testing.assert_close(got, gate_mul_reference(x, gate))


@interpreted
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "norm"),
    [(4, 2, 32, True), (6, 1, 16, False), (3, 3, 24, True), (8, 4, 128, True)],
)
def test_qk_norm_rope_store(heads: int, kv_heads: int, dim: int, norm: bool) -> None:
    tokens, block_size, blocks = 5, 4, 6
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    weights = (torch.randn(dim), torch.randn(dim)) if norm else None
    cos, sin = torch.randn(2, 50, dim // 2)
    rotation = Rotation(torch.randint(0, 50, (tokens,), dtype=torch.int32), cos, sin)
    slots = torch.randperm(block_size * blocks)[:tokens]
    slots[2] = -1
    ours, theirs = torch.full((2, blocks, block_size, 2, kv_heads, dim), float("nan"))
    about = (qkv, weights, 1e-6, rotation, slots)
    expected = qk_norm_rope_store_reference(*about, KVLayer.of(theirs))
    with poisoned_memory():
        got = qk_norm_rope_store(*about, KVLayer.of(ours))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@interpreted
@pytest.mark.parametrize("vocab", [7, 1024, 5003])
def test_sample(vocab: int) -> None:
    rows = 6
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16)
    temperature = torch.tensor([0.0, 0.6, 1.0, 0.0, 2.5, 0.1])
    seed = torch.randint(-(2**62), 2**62, (rows, 2))
    position = torch.randint(0, 10_000, (rows,), dtype=torch.int32)
    expected = sample(logits, temperature, seed, position)
    assert torch.equal(sample_shard(logits, temperature, seed, position)[1], expected)
    cut = vocab // 2 // 4 * 4
    if cut:
        left = sample_shard(logits[:, :cut], temperature, seed, position)
        right = sample_shard(logits[:, cut:], temperature, seed, position, vocab_offset=cut)
        assert torch.equal(torch.where(right[0] > left[0], right[1], left[1]), expected)


@interpreted
@pytest.mark.parametrize("vocab", [9, 5003])
def test_sample_at_or_above_the_least(vocab: int) -> None:
    """Rows of which much, one token, all, none and, by NaN, again all or none may be drawn."""
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab)).bfloat16()
    logits[6] = logits[6].round()
    logits[5, 0] = float("nan")
    temperature = torch.tensor([0.6, 1.0, 2.5, 1.0, 3.0, 1.0, 5.0])
    seed, position = keys(torch.arange(7)), torch.arange(7, dtype=torch.int32)
    best = logits.float().amax(1)
    least = best + torch.tensor([-2, 0, -1e9, 1, float("nan"), 0, 0])
    least[5] = -2.0
    _, got = sample_shard(logits, temperature, seed, position, least=least)
    assert torch.equal(got, sample(logits, temperature, seed, position, least=least))
    assert got[[3, 5]].tolist() == [NO_TOKEN, NO_TOKEN]
    assert torch.equal(got[[2, 4]], sample_shard(logits, temperature, seed, position)[1][[2, 4]])
    assert got[1] == logits[1].argmax()
    assert logits[6, got[6]] == best[6]
    cut = vocab // 2 // 4 * 4
    rest = (temperature, seed, position)
    left = sample_shard(logits[:, :cut], *rest, least=least)
    right = sample_shard(logits[:, cut:], *rest, least=least, vocab_offset=cut)
    best_of = torch.where(left[0].isnan() | (left[0] >= right[0]), left[1], right[1])
    assert torch.equal(best_of, got)


@interpreted
@pytest.mark.parametrize("programs", [8, 4224])
@pytest.mark.parametrize("vocab", [5, 3000])
def test_sample_without_a_choice(
    monkeypatch: pytest.MonkeyPatch, vocab: int, programs: int
) -> None:
    """NaN in the first, a middle and the last column, with numbers and with -inf beside it."""
    monkeypatch.setattr("layers.kernels.sampling._PROGRAMS", programs)
    logits = torch.randn(8, vocab)
    logits[3:7] = float("-inf")
    for row, column in enumerate((0, vocab // 2, vocab - 1, 0, vocab // 2, vocab - 1)):
        logits[row, column] = float("nan")
    logits[7, 2] = float("inf")
    for temperature in (torch.zeros(8), torch.ones(8)):
        at = keys(torch.arange(8)), torch.arange(8)
        best, got = sample_shard(logits, temperature, *at)
        assert torch.equal(got, sample(logits, temperature, *at))
        assert got.tolist() == [NO_TOKEN] * 7 + [2]
        assert best[:6].isnan().all()
        # Ranks compare the scores as integers: a NaN with another sign would look like the least.
        assert best[:6].view(torch.int32).gt(0).all()


@interpreted
def test_sample_of_no_rows() -> None:
    """A step in which no prompt ends draws nothing."""
    none = torch.zeros(0)
    best, got = sample_shard(torch.zeros(0, 3000), none, keys(none.long()), none.long())
    assert (best.shape, best.dtype) == ((0,), torch.float32)
    assert (got.shape, got.dtype) == ((0,), torch.int64)


@interpreted
@pytest.mark.parametrize("programs", [2, 4224])
def test_sample_takes_the_lowest_of_equals(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Also of equals that one thread of a program meets one after the other, 512 columns apart."""
    monkeypatch.setattr("layers.kernels.sampling._PROGRAMS", programs)
    logits = torch.zeros(2, 3000)
    logits[0, [1500, 1500 + 1024, 2900]] = 1.0
    zero = torch.zeros(2)
    assert sample_shard(logits, zero, keys(zero.long()), zero.long())[1].tolist() == [1500, 0]


@interpreted
@pytest.mark.parametrize(
    ("rows", "vocab_size", "dtype"),
    [
        (12, 1, torch.float32),
        (12, 37, torch.float32),
        (12, 37, torch.float16),
        (12, 40_000, torch.bfloat16),
        (11, 9000, torch.bfloat16),
    ],
)
def test_logit_bounds(rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    def kernel(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
        # The last case as if there were many rows.
        block = FEW_ROWS_BLOCK if rows == 12 else MANY_ROWS_BLOCK
        return logit_bounds(logits, filters, block=block)

    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(rows, vocab_size, generator=generator) * 4).to(dtype)
    logits[3:6] -= 50
    logits[6:9, vocab_size // 3 + 1 :] = float("-inf")
    logits[9:12] = logits[9:12].round()
    check_bounds(logits, vocab_size, kernel)
    # Rows may be strided.
    check_bounds(logits[::12, : max(1, vocab_size - 2)], 7, kernel)


def _by_small_blocks(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Bounds of a row as of a vocabulary of some 200,000: many blocks, logits gathered."""
    return logit_bounds(logits, filters, block=256)


# Of values that repeat in another type, or at another place, what the first one shows.
_SLOW = pytest.mark.slow


@interpreted
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        pytest.param(torch.float16, marks=_SLOW),
        pytest.param(torch.float32, marks=_SLOW),
    ],
)
def test_logit_bounds_of_hard_rows(dtype: torch.dtype) -> None:
    rows = hard_rows(2501, dtype)
    for seed in range(2):
        check_bounds(rows, seed, _by_small_blocks)


def _filters(rows: int, **values: float) -> Filters:
    defaults = {"temperatures": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
    return Filters(*(torch.full((rows,), v) for v in {**defaults, **values}.values()))


@interpreted
@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 0.9},
        pytest.param({"top_p": 0.5}, marks=_SLOW),
        pytest.param({"top_p": 0.99}, marks=_SLOW),
    ],
)
def test_a_wrong_guess_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, float]
) -> None:
    """Too low, too high, empty, the wrong way round, not a number: the search is then over all."""
    logits = torch.randn(1, 2501, generator=torch.Generator().manual_seed(4))
    filters = _filters(1, **values)
    right = _by_small_blocks(logits, filters)
    check_filters(logits, filters, _by_small_blocks)
    for low, high in ((-9.0, -7.0), (7.0, 9.0), (0.001, 0.001), (1.0, -1.0), (float("nan"),) * 2):
        monkeypatch.setattr(bounds, "guess_range", lambda *_, ends=(low, high): ends)
        assert torch.equal(_by_small_blocks(logits, filters), right)


@interpreted
@pytest.mark.parametrize(
    "scale", [1.0, pytest.param(0.1, marks=_SLOW), pytest.param(3.0, marks=_SLOW)]
)
@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 50.0},
        {"top_k": 700.0, "top_p": 0.9},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"top_p": 0.99},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_usual_rows_are_not_searched_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, float], scale: float
) -> None:
    lengths = []
    passes = bounds.search_in_passes

    def counted(ptr: Any, end: Any, *rest: Any) -> Any:
        lengths.append(int(end))
        return passes(ptr, end, *rest)

    monkeypatch.setattr(bounds, "search_in_passes", counted)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(2, 151_936, generator=generator) * scale).bfloat16()

    def kernel(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
        return logit_bounds(logits, filters, block=MANY_ROWS_BLOCK)

    check_filters(logits, _filters(2, **values), kernel)
    assert all(length <= 2 * MANY_ROWS_BLOCK for length in lengths)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")
def test_logit_bounds_of_nothing_keep_it() -> None:
    logits = torch.full((1, 2501), float("-inf"))
    for values in ({"top_k": 3.0}, {"top_p": 0.5}, {"top_k": 3.0, "top_p": 0.5, "min_p": 0.1}):
        least = _by_small_blocks(logits, _filters(1, **values))
        assert not (logits < least.unsqueeze(1)).any()
