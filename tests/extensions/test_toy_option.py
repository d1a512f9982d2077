"""A new key of `model.moe` is one place: the layer for other models accepts it, and the documentation lists it."""

from tests.extensions.copies import Row, extended_copy

FIELD = '''    toy_scale: PositiveFloat = 1.5
    """Scales nothing."""
'''
ANCHOR = '"""Weight of mean(logsumexp(router logits)^2) (ST-MoE, eq. 5)."""'
CODE = """
from moeport.torch import MoE
print(MoE(8, 2, 4, toy_scale=3.0).layer.config.toy_scale, MoE(8, 2, 4).layer.config.toy_scale)
MoE(8, 2, 4, toy_scal=2.0)
"""


def test_a_toy_key_of_the_layer(tmp_path):
    copy = extended_copy(tmp_path, {}, (Row("moeport/config/model.py", ANCHOR, FIELD),))
    assert copy.places == 1
    done = copy.python("-c", CODE)
    assert done.stdout == "3.0 1.5\n"
    assert done.stderr.endswith("toy_scal: unknown option of moeport.torch.MoE; did you mean toy_scale?\n")
    assert copy.python("docs/generate").stdout == "docs/configuration.md: written\nmoeport/torch/options.py: written\n"
    assert (
        '    toy_scale: float\n    """Scales nothing. Default: 1.5.'
        in (tmp_path / "moeport/torch/options.py").read_text()
    )
