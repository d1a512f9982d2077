"""The resolved config and the JSON Schema."""

import pytest

from moeport.config import Config, json_schema, load_config, resolved_yaml

OVERRIDES = [
    (),
    ("model.moe.router={name: sigmoid_bias, num_groups: 4, top_groups: 2}", "optimizer.eps=1e-12"),
    ("model.moe.router={name: topk, softmax: after}", "model.moe.capacity={policy: factor, drop: probability}"),
    ("data.source={name: files, paths: ['1e-3', 'yes', '2026-01-31', 'é']}", "data.tokenizer.name=byte"),
    ("model.attention.rope_bases=[2, 3.5, 4, 5, 6, 7, 8, 9]",),
    ("model.attention.rope_bases={kind: peak_valley, order: descending}",),
    ("optimizer.schedule={name: constant}", "optimizer.clip_norm=null", "run.dir='~'"),
]


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_resolved_yaml_loads_back(tmp_path, overrides):
    config = load_config(None, overrides)
    (tmp_path / "c.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config


def test_resolved_yaml_has_every_section_and_value():
    text = resolved_yaml(Config())
    assert text.startswith("run:\n  dir: runs/default\nmodel:\n  num_layers: 4\n")
    assert "    capacity:\n      policy: dropless\n      tile: 128\n      factor: 1.25\n      multiple_of: 1\n" in text


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_json_schema_accepts_configs(overrides):
    Validator = pytest.importorskip("jsonschema").Draft202012Validator
    Validator.check_schema(json_schema())
    Validator(json_schema()).validate(load_config(None, overrides).model_dump(mode="json"))


def test_json_schema_knows_the_short_forms():
    Validator = pytest.importorskip("jsonschema").Draft202012Validator
    for bases, is_valid in (([2.0, 3], True), (None, True), ([1], False), (3.0, False)):
        assert Validator(json_schema()).is_valid({"model": {"attention": {"rope_bases": bases}}}) == is_valid


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"d_modle": 1}},
        {"model": {"d_model": "256"}},
        {"training": {"steps": 0}},
        {"model": {"moe": {"router": {"top_k": 2}}}},
        {"model": {"moe": {"router": {"name": "switch", "top_k": 2}}}},
    ],
)
def test_json_schema_refuses(values):
    Validator = pytest.importorskip("jsonschema").Draft202012Validator
    assert not Validator(json_schema()).is_valid(values)


def test_every_key_has_a_description():
    schema = json_schema()
    assert schema["title"] == "moeport config"
    for section in [schema, *schema["$defs"].values()]:
        assert all(field.get("description") for field in section["properties"].values())
