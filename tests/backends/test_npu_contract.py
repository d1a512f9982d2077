"""What torch-npu's documentation forbids is refused with a sentence; no torch_npu is needed for that."""

import pytest
import torch

from moeport.backends.torch.npu import contract, operators
from moeport.backends.torch.npu.contract import ContractError, check, first
from moeport.backends.torch.npu.kernels import CANDIDATES, FUNCTIONS
from moeport.core.dispatch_plan import DispatchPlan
from moeport.facts import BACKENDS


def of(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def counts(number=8, dtype=torch.int64):
    return of(number, dtype=dtype)


def gmm(x=None, weight=None, group_list=None, group_type=0):
    x = of(32, 16) if x is None else x
    weight = of(8, 4, 16).mT if weight is None else weight
    return contract.grouped_matmul(x, weight, counts() if group_list is None else group_list, group_type=group_type)


def wgrad(x=None, weight=None, group_list=None):
    return gmm(of(32, 16).t() if x is None else x, of(32, 4) if weight is None else weight, group_list, 2)


def attend(q=None, k=None, v=None, mask=None, **options):
    q = of(2, 16, 4, 64) if q is None else q
    k = of(2, 16, 2, 64) if k is None else k
    given = {"head_num": q.shape[2], "input_layout": "BSND", "sparse_mode": 0, "atten_mask": mask}
    return contract.fusion_attention(q, k, k if v is None else v, **(given | options))


CAUSAL = of(2048, 2048, dtype=torch.bool)

ALLOWED = {
    "rms_norm": contract.rms_norm(of(4, 8), of(8, dtype=torch.float32)),
    "rms_norm of one type": contract.rms_norm(of(4, 8), of(8)),
    "rotary_mul": contract.rotary_mul(of(2, 16, 4, 64), of(1, 16, 1, 64), of(1, 16, 1, 64)),
    "swiglu": contract.swiglu(of(4, 8)),
    "attention": attend(),
    "causal attention": attend(mask=CAUSAL, sparse_mode=2),
    "masked attention": attend(mask=of(16, 16, dtype=torch.uint8)),
    "grouped_matmul": gmm(),
    "grouped_matmul of 1024": gmm(of(32, 16), of(1024, 4, 16).mT, counts(1024)),
    "weight gradient": wgrad(),
    "permute": contract.token_permute(of(4, 8), of(4, 2, dtype=torch.int32)),
    "unpermute": contract.token_unpermute(of(8, 16), of(8, dtype=torch.int32), of(4, 2)),
    "counts": contract.group_sizes([3, 0, 5], 8),
    "assignments": contract.assignments(16, 2, 8),
}

FORBIDDEN = {
    "rms_norm in float64": (
        contract.rms_norm(of(4, 8, dtype=torch.float64), of(8)),
        "x is float64; expected float16, bfloat16 or float32",
    ),
    "rms_norm, a narrow weight": (
        contract.rms_norm(of(4, 8, dtype=torch.float32), of(8)),
        "weight is bfloat16; expected float32",
    ),
    "rms_norm, a weight of another type": (
        contract.rms_norm(of(4, 8), of(8, dtype=torch.float16)),
        "weight is float16; expected bfloat16 or float32",
    ),
    "rms_norm of a vector": (contract.rms_norm(of(8), of(8)), "x has 1 dimensions; expected 2 to 8"),
    "rms_norm, another width": (
        contract.rms_norm(of(4, 8), of(9)),
        "weight has the shape (9,); expected (8,), the last dimension of x",
    ),
    "odd heads": (
        contract.heads(of(2, 16, 4, 63)),
        "the heads have the width 63; expected an even one below 896",
    ),
    "wide heads": (contract.heads(of(2, 16, 4, 896)), "the heads have the width 896; expected an even one below 896"),
    "many sequences": (
        contract.heads(of(1000, 16, 4, 64)),
        "there are 1000 sequences and 4 heads; expected fewer than 1000 each",
    ),
    "half the table": (
        contract.rotary_mul(of(2, 16, 4, 64), of(1, 16, 1, 32), of(1, 16, 1, 32)),
        "cos has the shape (1, 16, 1, 32); expected (1, 16, 1, 64) or (2, 16, 1, 64)",
    ),
    "a table of another type": (
        contract.rotary_mul(of(2, 16, 4, 64), of(1, 16, 1, 64, dtype=torch.float32), of(1, 16, 1, 64)),
        "cos is float32; expected bfloat16, as x is",
    ),
    "odd swiglu": (contract.swiglu(of(4, 7)), "x has the width 7; expected an even one"),
    "empty swiglu": (contract.swiglu(of(0, 8)), "x has the shape (0, 8); expected at least one element"),
    "strided swiglu": (
        contract.contiguous(of(8, 4).mT),
        "x of the shape (4, 8) has the strides (1, 4); expected a contiguous tensor",
    ),
    "attention layout": (attend(input_layout="XYZ"), "input_layout is XYZ; expected BSND"),
    "head_num": (attend(head_num=5), "head_num is 5; expected 4, the heads of q"),
    "heads that do not divide": (
        attend(of(2, 16, 5, 64)),
        "5 query heads read 2 heads of k and v; expected 1 to 256, a multiple of the latter",
    ),
    "too many heads": (
        attend(of(2, 16, 258, 64)),
        "258 query heads read 2 heads of k and v; expected 1 to 256, a multiple of the latter",
    ),
    "head width": (
        attend(of(2, 16, 4, 770), of(2, 16, 2, 770)),
        "the heads have the width 770; expected 1 to 768",
    ),
    "head width in float32": (
        attend(of(2, 16, 4, 6, dtype=torch.float32), of(2, 16, 2, 6, dtype=torch.float32)),
        "the heads have the width 6; expected 1 to 768, in float32 a multiple of 4",
    ),
    "k and v differ": (
        attend(v=of(2, 16, 1, 64)),
        "q, k and v have the shapes (2, 16, 4, 64), (2, 16, 2, 64) and (2, 16, 1, 64); expected (B, S, H, A), and "
        "twice (B, S, G, A)",
    ),
    "another batch": (
        attend(of(3, 16, 4, 64)),
        "q and k have the shapes (3, 16, 4, 64) and (2, 16, 2, 64); expected the same batch and head width",
    ),
    "float mask": (attend(mask=of(16, 16)), "atten_mask is bfloat16; expected bool or uint8"),
    "no mask": (attend(sparse_mode=2), "atten_mask is missing; expected one with sparse_mode 2"),
    "small causal mask": (
        attend(mask=of(16, 16, dtype=torch.bool), sparse_mode=2),
        "atten_mask has the shape (16, 16); expected (2048, 2048) with sparse_mode 2",
    ),
    "another mode": (attend(sparse_mode=4), "sparse_mode is 4; expected 0, 1 for all pairs, 2 for a causal mask"),
    "a mask of all pairs of one sequence": (
        attend(atten_mask=torch.ones(1, 1, 16, 16, dtype=torch.bool), sparse_mode=1),
        "atten_mask has the shape (1, 1, 16, 16); expected (2, 1, 16, 16) with sparse_mode 1",
    ),
    "group_list of int32": (gmm(group_list=counts(dtype=torch.int32)), "group_list is int32; expected int64"),
    "group_list of another length": (
        gmm(group_list=counts(5)),
        "group_list has the shape (5,); expected (8,), with one entry per group",
    ),
    "group_list of one": (
        gmm(weight=of(1, 16, 4), group_list=counts(1)),
        "group_list has one entry; expected at least 2, since one group is a plain product",
    ),
    "group_list of two dimensions": (
        wgrad(group_list=of(4, 2, dtype=torch.int64)),
        "group_list has the shape (4, 2); expected one dimension, with one entry per group",
    ),
    "too many groups": (
        gmm(weight=of(1025, 16, 4), group_list=counts(1025)),
        "there are 1025 experts on this rank; expected at most 1024",
    ),
    "wide weight": (gmm(weight=of(8, 16, 65_536)), "a width is 65536; expected less than 65536"),
    "inner dimensions": (
        gmm(weight=of(8, 17, 4)),
        "x and weight have the shapes (32, 16) and (8, 17, 4); expected equal inner dimensions",
    ),
    "grouped_matmul in float64": (
        gmm(of(32, 16, dtype=torch.float64), of(8, 16, 4, dtype=torch.float64)),
        "x is float64; expected float16, bfloat16 or float32",
    ),
    "mixed types": (gmm(weight=of(8, 16, 4, dtype=torch.float32)), "weight is float32; expected bfloat16, as x is"),
    "transposed rows": (gmm(of(16, 32).t()), "x has the strides (1, 32); expected a row-major matrix"),
    "rows of a weight gradient": (wgrad(of(16, 32)), "x has the strides (32, 1); expected the transpose of one"),
    "other groups": (gmm(group_type=1), "group_type is 1; expected 0 or 2"),
    "dimensions": (gmm(weight=of(16, 4)), "x and weight have 2 and 2 dimensions; expected 2 and 3"),
    "no rows": (gmm(of(0, 16)), "x has the shape (0, 16); expected at least one element"),
    "rows behind the last group": (contract.group_sizes([3, 0, 4], 8), "group_list covers 7 rows; expected all 8"),
    "negative counts": (
        contract.group_sizes([3, -1, 6], 8),
        "group_list is [3, -1, 6]; expected counts of at least 0",
    ),
    "float indices": (
        contract.token_permute(of(4, 8), of(4, 2)),
        "indices is bfloat16; expected int32 or int64",
    ),
    "indices of other tokens": (
        contract.token_permute(of(4, 8), of(5, 2, dtype=torch.int32)),
        "x and indices have the shapes (4, 8) and (5, 2); expected (T, D) and (T, K)",
    ),
    "many choices": (contract.assignments(4, 513), "a token has 513 experts; expected at most 512"),
    "more choices than experts": (contract.assignments(4, 9, 8), "a token has 9 experts of 8; expected at most 8"),
    "many assignments": (
        contract.assignments(2**23, 2),
        "there are 16777216 assignments; expected fewer than 16777215",
    ),
    "experts choose": (
        contract.assignments(4, None),
        "experts choose tokens, or rows are rounded; expected K rows per token",
    ),
    "positions of int64": (
        contract.token_unpermute(of(8, 16), of(8, dtype=torch.int64), of(4, 2)),
        "sorted_indices is int64; expected int32",
    ),
    "rows are missing": (
        contract.token_unpermute(of(7, 16), of(8, dtype=torch.int32), of(4, 2)),
        "there are 7 rows; expected 8, one for each entry of probs",
    ),
    "gates of another type": (
        contract.token_unpermute(of(8, 16), of(8, dtype=torch.int32), of(4, 2, dtype=torch.float32)),
        "probs is float32; expected bfloat16, as rows is",
    ),
}


@pytest.mark.parametrize("label", ALLOWED)
def test_what_is_documented_is_allowed(label):
    assert list(ALLOWED[label]) == []


@pytest.mark.parametrize("label", FORBIDDEN)
def test_what_is_forbidden_is_said(label):
    problems, message = FORBIDDEN[label]
    assert next(iter(problems)) == message


def test_the_first_problem_is_an_error_that_names_the_operator():
    with pytest.raises(ContractError, match=r"^npu_swiglu: x has the width 7; expected an even one$"):
        check("npu_swiglu", contract.swiglu(of(4, 7)))
    assert first(contract.swiglu(of(4, 8))) is None


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (operators.rms_norm, (of(8), of(8), 1e-5)),
        (operators.rotary_mul, (of(2, 16, 4, 63), of(1, 16, 1, 63), of(1, 16, 1, 63))),
        (operators.swiglu, (of(4, 7),)),
        (operators.fusion_attention, (of(2, 16, 5, 64), of(2, 16, 2, 64), of(2, 16, 2, 64), None)),
        (operators.grouped_matmul, (of(32, 16), of(8, 16, 4), counts(dtype=torch.int32), 0)),
        (operators.token_permute, (of(4, 8), of(4, 2))),
        (operators.token_unpermute, (of(8, 16), of(8, dtype=torch.int64), of(4, 2))),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_every_operator_is_called_after_its_check(call, arguments):
    """Without torch_npu a call that passes its check fails otherwise."""
    with pytest.raises(ContractError):
        call(*arguments)


def test_the_table_of_facts_and_the_table_of_functions_have_the_same_rows():
    facts = BACKENDS["torch"].fused_on("npu")
    assert {fact.name for fact in facts} == set(FUNCTIONS)
    assert [candidate.fact for candidate in CANDIDATES] == list(facts)
    assert {fact.name for fact in facts} - {"_fused_adamw_"} == set(operators.OPERATORS)


def plan(tokens, choices, experts):
    indices = of(tokens * (choices or 1), dtype=torch.int64)
    return DispatchPlan(indices, indices, indices, counts(experts), tokens, choices)


def experts(number, width=16, hidden=4):
    w_in, w_out = of(number, 2 * hidden, width), of(number, width, hidden)
    return of(32, width), w_in, w_out, counts(number), "swiglu"


HEADS = of(2, 16, 4, 64)
TABLES = of(16, 64, dtype=torch.float32), of(16, 64, dtype=torch.float32)
WIDE = of(2, 16, 4, 1024)
SERVED = {
    "npu_rms_norm": [((of(4, 8), of(8, dtype=torch.float32), 1e-5), None), ((of(8), of(8), 1e-5), "x has 1 dim")],
    "npu_rotary_mul": [((HEADS, *TABLES), None), ((WIDE, *TABLES), "the heads have the width 1024")],
    "npu_fusion_attention": [
        ((HEADS, HEADS, HEADS, True), None),
        ((WIDE, WIDE, WIDE), "the heads have the width 1024"),
    ],
    "npu_swiglu": [((of(4, 8),), None), ((of(4, 7),), "x has the width 7")],
    "npu_grouped_matmul": [
        (experts(8), None),
        (experts(1), None),
        (experts(2048), "there are 2048 experts on this rank; expected at most 1024"),
        (experts(8, hidden=65_536), "a width is 131072"),
    ],
    "npu_moe_token_permute": [
        ((of(16, 8), plan(16, 2, 8)), None),
        ((of(16, 8), plan(16, None, 8)), "experts choose tokens"),
        ((of(16, 8), plan(16, 9, 8)), "a token has 9 experts of 8"),
    ],
    "npu_moe_token_unpermute": [
        ((of(32, 8), of(32), plan(16, 2, 8)), None),
        ((of(32, 8), of(32), plan(16, None, 8)), "experts choose tokens"),
    ],
}


@pytest.mark.parametrize("name", SERVED)
def test_a_kernel_says_what_it_cannot_serve(name):
    _, limit = FUNCTIONS[name]
    for arguments, expected in SERVED[name]:
        reason = limit(*arguments)
        assert (reason is None) if expected is None else reason.startswith(expected)


def test_every_kernel_with_a_limit_is_covered():
    assert set(SERVED) | {"_fused_adamw_"} == set(FUNCTIONS)
