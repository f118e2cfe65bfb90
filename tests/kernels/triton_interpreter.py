"""The CUDA kernels against the definition, bit for bit, in Triton's interpreter: test_triton.py runs this file.

TRITON_INTERPRET=1 has to be set before Triton is imported, so it gets a process of its own.
"""

from __future__ import annotations

import copy
import math
import os
import weakref

import pytest
import torch
from kernels.common import (
    SHAPES_AND_DIMS,
    Odd,
    assert_equal_bits,
    assert_implements_definition,
    awkward_tensor,
    odd_registered,
    seeded,
)

from fairseq_dsq.bench.mocked_gpu import engines_of_a_gpu
from fairseq_dsq.formats import BlockFloat, definition, parse
from fairseq_dsq.kernels import masks, native, ops, triton_kernels
from fairseq_dsq.nn import DSQAttention, DSQContext, GemmConfig, convert
from fairseq_dsq.nn.saved import Activation
from fairseq_dsq.precision import PrecisionConfig, parse_q
from fairseq_dsq.quantized import ROUNDINGS

assert os.environ.get("TRITON_INTERPRET") == "1"

SEEDS = (None, 123456789 << 32 | 0xFFFFFFF0)
WIDTHS = [*range(2, 18), 20, 24, 25, 26, 31, 32]
# Both sides of a tile of 64 boxes along an outer dimension; short boxes along the last.
EDGES = [((2, 35, 33), 1), ((3, 40), -1)]


@pytest.fixture(autouse=True)
def kernels_for_any_device(monkeypatch):
    monkeypatch.setattr(ops, "_kernels", lambda device: triton_kernels)
    monkeypatch.setattr(ops, "_row_kernels", lambda *_: None)


assert_equals_definition = assert_implements_definition


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits):
    for index, (shape, dim) in enumerate(EDGES):
        x = awkward_tensor(shape, seed=bits + index)
        assert_equals_definition(x, BlockFloat(bits), dim, SEEDS[(bits + index) % 2])


@pytest.mark.parametrize("seed", SEEDS, ids=ROUNDINGS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS, ids=str)
def test_every_shape(shape, dim, seed):
    for fmt in (BlockFloat(4), BlockFloat(5, 6)):
        assert_equals_definition(awkward_tensor(shape, seed=3), fmt, dim, seed)


@pytest.mark.parametrize("box_size", [1, 3, 8, 32, 100, 256])
def test_every_box_size(box_size):
    assert triton_kernels.covers(BlockFloat(7, box_size).spec)
    for seed in SEEDS:
        assert_equals_definition(awkward_tensor((3, 270), seed=4), BlockFloat(7, box_size), 1, seed)
        assert_equals_definition(awkward_tensor((270, 3), seed=5), BlockFloat(4, box_size), 0, seed)


@pytest.mark.parametrize("seed", SEEDS, ids=ROUNDINGS)
@pytest.mark.parametrize("bits", [2, 4, 9, 16, 32])
def test_ties_and_special_values(bits, seed):
    halves = torch.arange(-40, 40) / 2.0  # of a step, where the box's largest is 2^(bits - 2)
    largest = torch.finfo(torch.float32).max
    boxes = [
        *torch.cat([halves, halves.new_full((16,), 0.75)]).view(6, 16).clamp(-(2.0 ** (bits - 2)), 2.0 ** (bits - 2)),
        torch.zeros(16),
        -torch.zeros(16),
        torch.full((16,), -(2.0**-149)),
        torch.tensor([2.0**-149, 2.0**-130, -(2.0**-127), 2.0**-126] * 4),
        torch.tensor([largest, -largest, 2.0**-149, -(2.0**-149)] * 4),
        torch.tensor([math.inf, -math.inf, largest, -1.0] * 4),
        torch.tensor([math.nan, -math.nan, -largest, 0.0] * 4),
        torch.tensor([1.0, 2.0**-150, -(2.0**-140), -(2.0**-30)] * 4),
    ]
    x = torch.stack(boxes)
    assert_equals_definition(x, BlockFloat(bits), 1, seed)
    assert_equals_definition(x.T.contiguous(), BlockFloat(bits), 0, seed)


@pytest.mark.parametrize("seed", SEEDS, ids=ROUNDINGS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 24, 25, 32])
def test_a_scale_that_fits(bits, seed):
    fmt = BlockFloat(bits, scale="fit")
    assert triton_kernels.covers(fmt.spec)
    top = 2.0 - 2.0 ** (2 - bits)  # the largest code's value where the exponent is 0
    tops = torch.tensor(
        [top, 1.0, 1.5, 2 - 2.0**-23, 2.0, torch.finfo(torch.float32).max, 2.0**-130, math.inf, math.nan]
    )
    x = torch.randn(len(tops), 16, generator=seeded(2)).clamp(-1, 1)
    x[:, 3] = tops
    x[6] *= 2.0**-127
    x[[0, 1], 5] = -torch.nextafter(tops[:2], torch.tensor(9.0))
    for y, dim in ((x, 1), (x.T.contiguous(), 0), (awkward_tensor((35, 40), seed=bits), 1)):
        assert_equals_definition(y, fmt, dim, seed)


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(triton_kernels, "WIDE_FROM", 0)
    for seed in SEEDS:
        for shape, dim in EDGES:
            assert_equals_definition(awkward_tensor(shape, seed=1), BlockFloat(5), dim, seed)
            assert_equals_definition(awkward_tensor(shape, seed=1), parse("fixed5/row"), dim, seed)
    test_one_read_for_both_directions_and_the_stash(("bfp2", "bfp16", "bfp2"), (2, 33, 130), monkeypatch)
    test_masks_and_dropout((7, 33), torch.float32)


def test_a_box_that_no_tile_holds_takes_the_plain_path():
    fmt = BlockFloat(4, 257)
    assert not triton_kernels.covers(fmt.spec)
    assert_equals_definition(awkward_tensor((2, 300), seed=1, finite=True), fmt, 1, None)


MINIFLOATS = ["mxfp4/16", "mxfp6e3m2/5-ceil", "mxfp8e4m3-even", "mxfp8e5m2/row", "mxint8-rceil"]


@pytest.mark.parametrize(("text", "seed"), [(text, SEEDS[place % 2]) for place, text in enumerate(MINIFLOATS)])
def test_minifloats(text, seed):
    fmt = parse(text)
    assert triton_kernels.covers(fmt.spec) and not triton_kernels.reads_once([fmt.spec], (1, 2, 3))
    assert_equals_definition(awkward_tensor((35, 3), seed=1), fmt, 0, seed)
    x = torch.randn(3, 70, generator=seeded(2)) * torch.tensor([[1.0], [2.0**-125], [2.0**-140]])
    assert_equals_definition(x, fmt, 1, None if seed else SEEDS[1])
    data = torch.randint(256, (fmt.nbytes((4, 64), 1),), generator=seeded(3), dtype=torch.uint8)
    expected = definition.unpack(data, (4, 64), fmt, 1, torch.float32)
    assert_equal_bits(ops.unpack(data, (4, 64), 1, text, torch.float32), expected)


@pytest.mark.parametrize(
    "fmt",
    [Odd(5, 16, (0, 15), False), Odd(6, 16, (-3, 31), True), Odd(7, 16, (-63, 63), True, -40), Odd(32, 5, (-9, 7))],
    ids=str,
)
@pytest.mark.parametrize("seed", SEEDS, ids=ROUNDINGS)
def test_any_range_of_codes(fmt, seed):
    assert triton_kernels.covers(fmt.spec)
    with odd_registered():
        for finite in (True, False):
            assert_equals_definition(awkward_tensor((5, 20), seed=1, finite=finite), fmt, 1, seed)


SHARED = [
    *(f"fixed{bits}" for bits in (2, 3, 8, 12, 16, 17, 25, 32)),
    *("fixed8/row", "fixed11/row", "fixed8-fit", "fixed8.4", "fixed32.16", "bfp4/row", "bfp13/row-fit"),
]


@pytest.mark.parametrize(("text", "seed"), [(text, SEEDS[place % 2]) for place, text in enumerate(SHARED)])
def test_one_scale_for_a_row_or_the_tensor(text, seed):
    fmt = parse(text)
    assert triton_kernels.covers(fmt.spec)
    for index, (shape, dim) in enumerate(
        [((2, 1030), 1), ((3, 64), 1), ((35, 6), 0), ((2, 19, 3), 1), ((1024,), 0), ((), 0)]
    ):
        x = awkward_tensor(shape, seed=index, finite=index > 0 or fmt.group == "tensor")
        assert_equals_definition(x, fmt, dim, seed)
    assert_equals_definition(awkward_tensor((9, 5), seed=1), fmt, 0, seed)


@pytest.mark.parametrize("text", ["fixed8", "fixed8/row", "int8/row"])
def test_the_sign_of_a_nan_that_torch_finds_to_be_the_largest_does_not_count(text, monkeypatch):
    found = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **rest: -found(*args, **rest))
    x = torch.randn(3, 1030, generator=seeded(1))
    x[1, 7] = math.nan
    assert_equals_definition(x, parse(text), 1, None)


FLOAT_SCALED = ["int8/row", "int4/16", "int2/5", "int16/tensor", "int11/row"]
FLOAT_SCALED += ["fp8e4m3/tensor", "fp8e5m2/row", "fp8e4m3/32", "fp8e5m2/tensor", "fp8e4m3/row"]


@pytest.mark.parametrize(("text", "seed"), [(text, SEEDS[place % 2]) for place, text in enumerate(FLOAT_SCALED)])
def test_a_float_scale(text, seed):
    fmt = parse(text)
    assert triton_kernels.covers(fmt.spec) and not triton_kernels.reads_once([fmt.spec], (1, 2, 3))
    for index, (shape, dim) in enumerate([((2, 1030), 1), ((35, 6), 0), ((2, 19, 3), 1), ((3, 32), 1)]):
        x = awkward_tensor(shape, seed=index, finite=index > 1 or fmt.group == "tensor")
        x[..., 0] *= 2.0**-100
        assert_equals_definition(x, fmt, dim, seed)
    largest = torch.finfo(torch.float32).max
    specials = [[largest, -1.0, 3.0], [2.0**-149, -(2.0**-149), 0.0], [-0.0, 0.0, -0.0], [math.inf, -2.0, math.nan]]
    x = torch.tensor(specials)[: 3 if fmt.group == "tensor" else 4]
    assert_equals_definition(x, fmt, 1, seed)
    assert_equals_definition(x[1:2], fmt, 1, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype):
    for text in ("bfp4", "bfp12", "fixed8", "fixed14/row", "int8/row"):
        fmt = parse(text)
        for dim in (0, 1):
            x = awkward_tensor((19, 20), dtype=dtype, seed=dim)
            expected = definition.fake_quantize(x, fmt, dim, SEEDS[dim], dtype)
            assert_equal_bits(ops.fake_quantize(x, dim, text, SEEDS[dim], dtype), expected)
            data = definition.pack(x, fmt, dim, SEEDS[dim])
            assert torch.equal(ops.pack(x, dim, text, SEEDS[dim]), data)
            assert_equal_bits(ops.unpack(data, x.shape, dim, text, dtype), expected)


BOTH = [("bfp2", "bfp16", "bfp2"), ("bfp16", "bfp9", "bfp16"), ("bfp8-fit", "bfp3-fit", "bfp7"), ("bfp25", "bfp24", "")]
BOTH += [("", "", "bfp5-fit"), ("", "bfp17", "bfp3"), ("bfp32", "bfp32", "bfp32"), ("fixed16", "", "fixed4")]
BOTH += [("fixed9-fit", "fixed8.4", "fixed12"), ("fixed17", "fixed3", ""), ("", "", "fixed5-fit")]
BOTH += [("fixed32", "", "fixed2"), ("fixed7-fit", "", "fixed12"), ("fixed12.3", "", "fixed7")]


SHAPES = [(64, 32), (2, 33, 70), (5, 9), (2, 1, 20, 40), (37, 31)]


@pytest.mark.parametrize(("formats", "shape"), [(each, SHAPES[place % 5]) for place, each in enumerate(BOTH)], ids=str)
def test_one_read_for_both_directions_and_the_stash(formats, shape, monkeypatch):
    passes = []
    launch = triton_kernels.quantize_both
    monkeypatch.setattr(triton_kernels, "quantize_both", lambda *args: passes.append(1) or launch(*args))
    fixed = any("fixed" in text for text in formats)
    for dtype, in_terms in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        x = awkward_tensor(shape, dtype=dtype, seed=len(shape), finite=fixed and dtype is torch.float32)
        if fixed and dtype is torch.float32:  # so large that a scale that fits is another
            x.view(-1)[3] = torch.ldexp(torch.tensor(1.999), torch.frexp(x.abs().max())[1])
        *rounded, stash = ops.quantize_both([x], *formats, dtype, in_terms)
        for got, text, dim in zip(rounded, formats, (-1, -2), strict=False):
            if not text:
                assert got.numel() == 0
                continue
            fmt = parse(text)
            expected = definition.fake_quantize(x, fmt, dim, None, dtype)
            if not in_terms:
                assert_equal_bits(got, expected)
                continue
            assert got.dtype is torch.bfloat16 and got.shape == (ops.terms(fmt.significand_bits), *shape)
            # What lies below the smallest bfloat16 is lost.
            whole = sum(term.double() for term in got)
            lost = (whole - expected).abs()
            assert ((lost < 2.0**-132) | expected.isnan() & whole.isnan()).all()
        if formats[2]:
            assert torch.equal(stash, definition.pack(x, parse(formats[2]), -2, None))
    assert len(passes) == 3


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.float32), (3, torch.bfloat16), (4, torch.float32)])
def test_matrices_that_lie_apart_are_as_if_they_had_been_stacked(count, dtype, monkeypatch):
    passes = []
    launch = triton_kernels.quantize_both
    monkeypatch.setattr(triton_kernels, "quantize_both", lambda xs, *rest: passes.append(len(xs)) or launch(xs, *rest))
    xs = [awkward_tensor((33, 70), dtype=dtype, seed=place) for place in range(count)]
    for in_terms in (False, dtype is torch.float32):
        arguments = "bfp16", "bfp3", "bfp4", dtype, in_terms
        expected = ops.quantize_both([torch.stack(xs)], *arguments)
        passes.clear()
        *rounded, stash = ops.quantize_both(xs, *arguments)
        assert torch.equal(stash, expected[2])
        for got, wanted in zip(rounded, expected, strict=False):
            assert_equal_bits(got, wanted)
        assert passes == [count if count <= triton_kernels.MOST_APART else 1]
    with pytest.raises(ValueError, match=r"^quantize_both: got fixed16 for \d tensors, expected one, which shares its"):
        ops.quantize_both(xs, "fixed16", "", "fixed4", dtype, False)
    with pytest.raises(ValueError, match=r"^xs: got \[33, 70\] of .*, \[33, 5\] of .*, expected tensors of one shape"):
        ops.quantize_both([xs[0], xs[0][:, :5]], *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [-1, -2])
def test_many_matrices_in_one_launch(dim, dtype):
    xs = [awkward_tensor(shape, dtype=dtype, seed=4) for shape in [(64, 128), (5, 9), (33, 70), (1, 1)]]
    xs[2] = xs[2].nan_to_num(0.5, 9.0, -7.0)
    for text in ("bfp2", "bfp12", "bfp16-fit", "fixed16", "fixed5-fit", "fixed9.4"):
        fmt = parse(text)
        matrices = ops.Matrices(xs, dim, fmt)
        for _ in range(2):
            for got, x in zip(matrices.quantize(), xs, strict=True):
                terms = ops.round_terms(x, dim, text, None)
                one = ops.fake_quantize(x, dim, text, None, dtype)
                assert_equal_bits(got, terms if dtype is torch.float32 else one)
            xs[1].mul_(-0.3)  # what is there when it is asked for
    assert matrices.are(xs) and not matrices.are([xs[0], xs[1].clone(), *xs[2:]])


@pytest.fixture
def passes(monkeypatch):
    """How many matrices each launch rounded that rounded several."""
    counted = []
    quantize = ops.Matrices.quantize
    monkeypatch.setattr(ops.Matrices, "quantize", lambda self: counted.append(len(self._shapes)) or quantize(self))
    with engines_of_a_gpu():
        yield counted


def test_a_gpu_s_own_nan_is_stored_as_one():
    """Its mantissa is all ones, which rounding would carry into the sign."""
    x = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, 0x7F7FFFFF], dtype=torch.int32).view(torch.float32)
    out = torch.empty(5, dtype=torch.bfloat16)
    triton_kernels.mask(x, torch.tensor([31], dtype=torch.uint8), out)
    assert out.tolist()[3:] == [torch.inf, torch.inf] and out[:3].isnan().all()


def two_layers(rounding="nearest"):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.ReLU(), torch.nn.Linear(33, 17, bias=False))
    return convert(model, DSQContext(GemmConfig(PrecisionConfig(parse_q("[4,2,2,16]"), "bfp"), rounding)))


def step(model, seed=0):
    """The output, and the gradients of a step on the same input."""
    model.zero_grad()
    x = torch.randn(5, 20, generator=seeded(seed)).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def assert_same(got, expected):
    assert all(map(torch.equal, got, expected))


def test_weights_go_together_from_the_second_pass_on_and_are_never_older_than_it(passes):
    model = two_layers()
    first = step(model)
    assert passes == []
    assert_same(step(model), first)
    assert passes == [2, 2]  # for the output GEMMs, and for those of grad_input
    for parameter in model.parameters():
        parameter.data.mul_(0.9)  # as fairseq's optimizers write: autograd's count of versions does not see it
    alone = two_layers()
    alone.load_state_dict(model.state_dict())
    assert_same(step(model, 3), step(alone, 3))
    assert passes == [2, 2] * 2
    model[0].weight.data = model[0].weight.data.clone()
    assert_same(step(model), step(alone))
    assert model[0].context.together.current is None


def test_what_the_output_gemms_read_is_dropped_after_the_forward_pass(monkeypatch):
    quantize, held = ops.Matrices.quantize, []

    def note(matrices):
        made = quantize(matrices)
        held.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(ops.Matrices, "quantize", note)
    with engines_of_a_gpu():
        model = two_layers()
        step(model)
        y = model(torch.ones(2, 20))
        assert len(held) == 1 and held[0]() is None
        y.sum().backward()
        del y
    assert len(held) == 2 and held[1]() is None


def test_a_copy_learns_its_own_weights(passes):
    model = two_layers()
    step(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    expected = step(twin)
    assert passes == []
    assert_same(step(twin), expected)
    assert passes == [2, 2]
    assert not torch.equal(step(model)[0], expected[0])


def test_a_weight_that_changes_within_a_pass_is_rounded_anew(passes):
    model, alone = two_layers(), two_layers()
    step(model)

    def halve(module, _):
        with torch.no_grad():
            module.weight.mul_(0.5)

    for each in (model, alone):
        each[2].register_forward_pre_hook(halve)
    assert_same(step(model), step(alone))


def test_evaluation_stochastic_rounding_and_a_pass_that_fails_leave_nothing_behind(passes):
    model, noisy = two_layers(), two_layers("stochastic")
    step(model)
    model.eval()
    model(torch.ones(2, 20))
    with torch.no_grad():
        model.train()(torch.ones(2, 20))
    for _ in range(2):
        step(noisy)
    assert passes == []
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 7))
    assert model[0].context.together.current is None


def test_formats_without_boxes_of_sixteen_are_read_twice():
    x = awkward_tensor((37, 50), seed=1)
    along, across, stash = ops.quantize_both([x], "bfp4/8", "bfp12/32", "bfp3/5", torch.float32, False)
    assert_equal_bits(along, definition.fake_quantize(x, parse("bfp4/8"), -1, None, torch.float32))
    assert_equal_bits(across, definition.fake_quantize(x, parse("bfp12/32"), -2, None, torch.float32))
    assert torch.equal(stash, definition.pack(x, parse("bfp3/5"), -2, None))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1,), torch.float32), ((7, 33), torch.bfloat16), ((2, 1030), torch.float16)], ids=str
)
def test_masks_and_dropout(shape, dtype):
    x = awkward_tensor(shape, dtype=dtype, seed=3)
    ones = masks.pack_positive(x)
    assert torch.equal(ops.pack_positive(x), ones)
    assert_equal_bits(ops.mask(x, ones), masks.mask(x, ones))
    for seed in (0, SEEDS[1]):
        assert_equal_bits(ops.dropout(x, 0.3, 1 / 0.7, seed), masks.dropout(x, 0.3, 1 / 0.7, seed))


def test_operand_and_stash_at_once():
    x = torch.randn(20, 40, generator=seeded(1)).bfloat16()
    operand, stash = ops.quantize_and_pack(x, "bfp4", "bfp2", x.dtype)
    assert_equal_bits(operand, definition.fake_quantize(x, BlockFloat(4), -1, None, x.dtype))
    assert torch.equal(stash, definition.pack(x, BlockFloat(2), -2, None))


@pytest.mark.parametrize("pair", [("bfp4/row", "bfp2"), ("bfp4", "fixed8/row"), ("bfp4/8", "bfp2")], ids=str)
def test_operand_and_stash_of_which_one_has_no_boxes_of_sixteen(pair):
    x = awkward_tensor((20, 40), seed=1)
    operand, stash = ops.quantize_and_pack(x, *pair, x.dtype)
    assert_equal_bits(operand, definition.fake_quantize(x, parse(pair[0]), -1, None, x.dtype))
    assert torch.equal(stash, definition.pack(x, parse(pair[1]), -2, None))


@pytest.mark.parametrize("text", ["bfp4", "bfp13/8", "fixed8", "fixed16/row", "fixed24", "bfp25"])
def test_terms(text):
    fmt = parse(text)
    for seed in SEEDS:
        x = torch.ldexp(torch.randn(35, 20, generator=seeded(1)), torch.randint(-20, 20, (35, 1), generator=seeded(2)))
        for dim in (0, 1):
            count, expected = (
                ops.terms(fmt.significand_bits),
                definition.fake_quantize(x, fmt, dim, seed, torch.float32),
            )
            packed = definition.pack(x, fmt, dim, seed)
            for terms in (ops.round_terms(x, dim, text, seed), ops.unpack_terms(packed, x.shape, dim, text)):
                assert terms.dtype is torch.bfloat16 and len(terms) == count
                assert torch.equal(terms.double().sum(0), expected.double())
                assert torch.equal(terms, ops.split(expected, count))


def test_a_device_is_checked(monkeypatch):
    device = torch.device("cpu")
    triton_kernels.check(device)
    monkeypatch.setattr(triton_kernels, "_seed_halves", lambda seed: (0, 0))
    with pytest.raises(triton_kernels.DifferentResult, match="the result is not that of the definition"):
        triton_kernels.check(device)


def attention_step(text, fmt, rounding, dtype):
    """Bytes that are stashed, then the output and all gradients of attention, with ReLU's mask behind it."""
    torch.manual_seed(3)
    context = DSQContext(GemmConfig(PrecisionConfig(parse_q(text), fmt), rounding))
    module, activation = DSQAttention(32, 2, context).to(dtype), Activation(torch.relu, context)
    x = torch.randn(19, 2, 32, generator=seeded(1)).to(dtype).requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = activation(module(x, x, x)[0])
    y.float().square().sum().backward()
    results = [y, x.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(result.dtype is dtype for result in results)
    return [tensor for tensor in kept if tensor.dtype is torch.uint8], [result.detach().float() for result in results]


@pytest.mark.parametrize(
    ("text", "fmt", "rounding", "dtype"),
    [
        ("[2,2,2,16]", "bfp", "nearest", torch.float32),
        ("[16,16,16,16]", "bfp", "nearest", torch.float32),
        ("[16,4,4,16]", "bfp", "stochastic", torch.float32),
        ("[16,4,4,16]", "fixed", "nearest", torch.float32),
        ("[16,4,4,16]", "fixed", "stochastic", torch.float32),
        ("[8,8,8,8]", "bfp", "nearest", torch.bfloat16),
    ],
)
def test_a_step_as_on_a_gpu_is_the_cpu_s(text, fmt, rounding, dtype, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(ops, "_kernels", lambda device: native.kernels)
        here_bytes, here = attention_step(text, fmt, rounding, dtype)
    with engines_of_a_gpu():
        there_bytes, there = attention_step(text, fmt, rounding, dtype)
    # What follows from a product differs in the last bits, and so may what is rounded of it: x's own stash does not.
    # The gradient of the keys' bias cancels.
    assert torch.equal(there_bytes[0], here_bytes[0])
    assert [len(each) for each in there_bytes] == [len(each) for each in here_bytes]
    for got, expected in zip(there, here, strict=True):
        assert (got - expected).norm() <= (1e-3 if dtype is torch.float32 else 0.05) * expected.norm().clamp_min(0.1)
