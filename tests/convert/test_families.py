"""The table of families against the classes of transformers, and the types of elements against torch."""

import numpy as np
import pytest

from moeport.config.model import ModelConfig
from moeport.convert.config_in import settings_of
from moeport.convert.config_out import differences, keys_of
from moeport.convert.family import FAMILIES
from moeport.convert.floats import DTYPES, decoded, encoded
from moeport.convert.parts import parts
from moeport.model.decoder import DecoderLM
from tests.convert.folders import config_of
from tests.support import rng

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
OTHER_NAMES = {"rope_theta": lambda config: config.rope_parameters["rope_theta"]}


@every_family
def test_what_transformers_takes_for_missing_keys(family):
    """Each default of the table is the class's, once it has filled in what follows from other keys."""
    config = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))()
    filled = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": None,
        "mlp_only_layers": [],
        "sliding_window": None,
    }
    for key, value in family.defaults.items():
        theirs = OTHER_NAMES[key](config) if key in OTHER_NAMES else getattr(config, key, None)
        if key == "layer_types":
            assert {*theirs} == {"full_attention"}
        elif key == "sliding_window" and value is not None:
            assert not theirs  # switched off by use_sliding_window
        elif key == "head_dim" and value is None:
            assert theirs in (None, config.hidden_size // config.num_attention_heads)
        else:
            assert theirs == value or (value is None and theirs == filled[key]), key
    assert family.architecture == getattr(transformers, family.architecture).__name__


@every_family
def test_every_key_that_the_class_has_is_known(family):
    config = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))()
    config.architectures = [family.architecture]
    needed = {"num_experts_per_tok": 6} if family.model_type == "deepseek_v2" else {}  # its class has no default
    settings_of(family, config.to_dict() | needed, "config.json")
    settings_of(family, {"model_type": family.model_type} | needed, "config.json")


@every_family
@pytest.mark.parametrize("layout", ["experts", "fused"])
def test_parts_cover_the_model_once(family, layout):
    config = config_of(family.model_type)
    model = ModelConfig.model_validate(settings_of(family, config, "config.json").model)
    sizes = {spec.name: spec.size for spec in DecoderLM(model, 260).parameter_specs()}
    found = parts(family, model, 260, layout)
    for name, ranges in _ranges((part.parameter, part.offset, part.size) for part in found).items():
        assert ranges == sizes.pop(name)
    assert all(family.is_dense and name.endswith("moe.router.weight") for name in sizes)
    shapes = {part.tensor: part.shape for part in found}
    for name, size in _ranges((part.tensor, part.start, part.size) for part in found).items():
        assert size == np.prod(shapes[name])
    assert len({part.label for part in found}) == len(found)


def _ranges(pieces):
    """Sizes by name of pieces that follow one another without gaps."""
    ends = {}
    for name, start, size in sorted(pieces):
        assert start == ends.get(name, 0)
        ends[name] = start + size
    return ends


@every_family
def test_keys_that_are_written_say_what_was_read(family):
    config = config_of(family.model_type)
    settings = settings_of(family, config, "config.json")
    model = ModelConfig.model_validate(settings.model)
    keys = keys_of(family, model, 260, settings.sequence_length)
    assert differences(family, model, 260, keys) == []
    again = ModelConfig.model_validate(settings_of(family, keys, "config.json").model)
    assert differences(family, again, 260, config) == []
    if not family.is_dense and family.balance == "router_aux_loss_coef":
        assert keys["router_aux_loss_coef"] == pytest.approx(family.defaults["router_aux_loss_coef"], rel=1e-12)


@pytest.mark.parametrize("code", DTYPES)
def test_elements_are_decoded_exactly_and_rounded_as_torch_rounds(code):
    dtype = getattr(torch, DTYPES[code])
    wide = "F64" if code == "F64" else "F32"
    values = torch.tensor(rng(1).standard_normal(1000) * 10.0 ** rng(2).integers(-9, 4, 1000))
    extremes = torch.tensor([0.0, -0.0, 65504.0, 6e-8, 1e-40, 2.0**-133, 1.00390625, 1.01171875])
    values = torch.cat((values, extremes.double())).to(getattr(torch, DTYPES[wide]))
    narrow = values.to(dtype)
    finite = torch.isfinite(narrow)
    block = encoded(values.numpy(), code)
    got = torch.frombuffer(bytearray(block), dtype=dtype)
    assert torch.equal(got[finite], narrow[finite])
    back = decoded(block, code)
    np.testing.assert_array_equal(back[finite.numpy()], narrow[finite].to(values.dtype).numpy())
    assert encoded(back[finite.numpy()], code) == narrow[finite].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_every_number_of_16_bits_comes_back(code):
    block = np.arange(2**16, dtype=np.uint16).tobytes()
    values = decoded(block, code)
    finite = np.isfinite(values)
    want = np.frombuffer(block, np.uint16)[finite]
    np.testing.assert_array_equal(np.frombuffer(encoded(values[finite], code), np.uint16), want)


def test_numbers_that_are_too_large_become_infinite():
    assert not np.isfinite(decoded(encoded(np.array([1e6], np.float32), "F16"), "F16"))
    assert not np.isfinite(decoded(encoded(np.array([3.4e38], np.float32), "BF16"), "BF16"))
