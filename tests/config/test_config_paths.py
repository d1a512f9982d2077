"""`~` and environment variables in every key that holds a path."""

from pathlib import Path

import pytest

from moeport.config import config_from_dict, load_config, resolved_yaml
from moeport.config.keys import keys
from moeport.config.rules import value_at
from moeport.errors import ConfigError

VALUES: dict[str, dict] = {
    "run.dir": {},
    "data.cache_dir": {},
    "data.root": {},
    "training.start_from": {},
    "data.tokenizer.path": {"data": {"tokenizer": {"name": "file", "path": "x"}}},
    "data.source.paths": {"data": {"source": {"name": "files", "paths": ["x"]}}},
    "data.source.validation_paths": {"data": {"source": {"name": "files", "paths": ["x"]}}},
    "data.source.exclude": {"data": {"source": {"name": "files", "paths": ["x"]}}},
    "data.source.dataset": {"data": {"source": {"name": "huggingface", "dataset": "x"}}},
}
"""By key, the config that it can be set in."""


@pytest.fixture(autouse=True)
def _home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data/$HOME [1]")
    monkeypatch.setenv("LATER", "~/later")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)


def is_list(key):
    return key in ("data.source.paths", "data.source.validation_paths", "data.source.exclude")


def with_value(key, value):
    tree = {section: dict(values) for section, values in VALUES[key].items()}
    node: dict = tree
    parts = key.split(".")
    for part in parts[:-1]:
        node = node.setdefault(part, {})
    node[parts[-1]] = [value] if is_list(key) else value
    return tree


def read(key, value):
    found = value_at(config_from_dict(with_value(key, value)), key)
    return found[0] if is_list(key) else found


def test_every_key_that_holds_a_path_is_tested():
    paths = {key.path for key in keys() if "path" in key.expected.split()}
    assert paths <= set(VALUES)


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("$DATA/x", "/data/$HOME [1]/x"),
        ("a/${DATA}b", "a//data/$HOME [1]b"),
        ("$LATER/x", "/home/me/later/x"),
        ("a$$HOME/~", "a$HOME/~"),
        ("$$DATA", "$DATA"),
        ("./~x", "./~x"),
        ("price 5$", "price 5$"),
    ],
)
def test_a_path_is_expanded_once(key, written, meant):
    found = read(key, written)
    assert str(found) == (str(Path(meant)) if isinstance(found, Path) else meant)


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize("written", ["~/x", "$DATA/x", "a$$HOME/~", "./~x"])
def test_a_resolved_config_loads_back_to_an_equal_one(key, written, tmp_path):
    config = config_from_dict(with_value(key, written))
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("$UNSET/x", "the environment variable UNSET is not set; set it, or write $$ for a dollar sign (got $UNSET/x)"),
        ("${UNSET}", "the environment variable UNSET is not set; set it"),
        ("x/$EMPTY", "the environment variable EMPTY is empty; set it"),
        ("${A:-b}", "${A:-b} is not an environment variable; write $NAME, ${NAME}, or $$ for a dollar sign"),
        ("~nobody-of-that-name/x", "there is no home folder for ~nobody-of-that-name; write ./~nobody-of-that-name"),
    ],
)
def test_what_cannot_be_expanded_is_named_with_its_key(key, written, wrong):
    with pytest.raises(ConfigError) as caught:
        read(key, written)
    assert str(caught.value).startswith(f"{key}{'[0]' if is_list(key) else ''}: {wrong}")
    assert "\n" not in str(caught.value)


def test_overrides_are_expanded_and_placed():
    assert load_config(None, ["run.dir=~/x"]).run.dir == Path("/home/me/x")
    with pytest.raises(ConfigError, match=r"^--set run\.dir=\$UNSET run\.dir: the environment variable UNSET is not"):
        load_config(None, ["run.dir=$UNSET"])
