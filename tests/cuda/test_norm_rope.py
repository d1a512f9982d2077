"""What serves norms, rope and attention on CUDA, as far as that shows on the CPU."""

import pytest
import torch

from moeport.backends.torch.cuda import attention, norm_rope
from moeport.backends.torch.ops import TorchOps
from moeport.core.ops import AttentionOptions, Ops

pytestmark = pytest.mark.usefixtures("bits_may_change")

OPS = TorchOps(torch.device("cpu"))


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def value_and_gradients(function, *leaves):
    wanted = [x.clone().requires_grad_() for x in leaves]
    y = function(*wanted)
    return [y.detach(), *torch.autograd.grad(y, wanted, draw(y.shape, y.dtype, 9))]


def assert_same(received, expected, tolerance):
    for got, want in zip(received, expected, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max()


def test_what_the_kernels_do_not_serve():
    q, wide = torch.empty(1, 4, 2, 64), torch.empty(1, 1, 1, 16384)
    assert norm_rope.rms_norm_limit(wide, wide[0, 0, 0], 1e-5) == "rows have the width 16384; expected up to 8192"
    assert norm_rope.rope_limit(wide, wide, wide) == "heads have the width 16384; expected up to 8192"
    assert norm_rope.rms_norm_limit(q, q, 1e-5) is norm_rope.rope_limit(q, q, q) is None
    assert attention.efficient_limit(q, q, q) == "heads are not grouped"
    assert attention.efficient_limit(q, q[:, :, :1], q[:, :, :1]) is None
    odd = torch.empty(1, 4, 2, 36)
    fault = "heads have the width 36; expected a multiple of 8 up to 128"
    assert attention.flash_attention_3_limit(odd, odd, odd) == fault.replace("128", "256")
    assert attention.cudnn_limit(odd, odd, odd) == fault


def test_kernels_without_a_mask_do_not_serve_documents():
    q, k, documents = torch.empty(1, 4, 2, 64), torch.empty(1, 4, 1, 64), torch.zeros(1, 4, dtype=torch.int64)
    limits = attention.flash_attention_3_limit, attention.cudnn_limit, attention.efficient_limit
    for limit in limits:
        assert limit(q, k, k) is None
        assert limit(q, k, k, AttentionOptions(document_BS=documents)) == "documents are masked (data.document_mask)"


@pytest.mark.parametrize("causal", [True, False])
def test_repeated_keys_are_those_of_grouped_heads(causal, monkeypatch):
    """The kernel is CUDA's, but what is asked of it is the attention of grouped heads."""
    monkeypatch.setattr(attention, "sdpa_kernel", lambda _: torch.enable_grad())
    arguments, options = [draw((2, 9, heads, 16), seed=heads) for heads in (6, 2, 2)], AttentionOptions(causal)
    received = value_and_gradients(lambda q, k, v: attention.efficient(OPS, q, k, v, options), *arguments)
    assert_same(received, value_and_gradients(lambda q, k, v: Ops.attention(OPS, q, k, v, options), *arguments), 1e-6)


def test_determinism_decides_which_attention_may_serve():
    q = torch.empty(1, 4, 2, 256)
    torch.use_deterministic_algorithms(True)
    assert attention.cudnn_limit(q, q, q) == attention.NOT_DETERMINISTIC
    assert attention.flash_attention_3_limit(q, q, q).endswith("expected a multiple of 8 up to 192")
    torch.use_deterministic_algorithms(False)
    assert attention.flash_attention_3_limit(q, q, q) is None
    assert attention.cudnn_limit(q, q, q) == "heads have the width 256; expected a multiple of 8 up to 128"


def test_flash_attention_3_is_called_in_the_layout_of_the_arguments(monkeypatch):
    """Its releases return the output, or the output and the log-partition."""
    for wrap in (lambda y: y, lambda y: (y, None)):

        class Interface:
            @staticmethod
            def flash_attn_func(q, k, v, *, causal, softmax_scale, deterministic, wrap=wrap):
                assert not deterministic
                return wrap(TorchOps.attention(OPS, q, k, v, AttentionOptions(causal, softmax_scale)))

        monkeypatch.setattr(attention, "import_module", {"flash_attn_interface": Interface}.get)
        arguments = [draw((2, 9, heads, 16), seed=heads) for heads in (6, 2, 2)]
        received = value_and_gradients(lambda *x: attention.flash_attention_3(OPS, *x), *arguments)
        assert_same(received, value_and_gradients(lambda *x: Ops.attention(OPS, *x), *arguments), 1e-6)
