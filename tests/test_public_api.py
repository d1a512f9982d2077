import subprocess
import sys

import pytest
from rich.console import Console

import moeport
from moeport.routers import ROUTERS
from tests.training.tiny import tiny_config


def test_every_public_name_is_there():
    assert {*moeport.__all__} == {*moeport._PLACES, "__version__"}
    for name in moeport.__all__:
        assert getattr(moeport, name) is not None
    with pytest.raises(AttributeError, match="module 'moeport' has no attribute 'trian'"):
        _ = moeport.trian


def test_importing_the_package_imports_no_framework():
    code = "import sys, moeport; assert not {'torch', 'numpy', 'pydantic', 'mindspore'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_routers_are_named_with_their_config_and_router():
    for name, (config, router) in ROUTERS.items():
        assert config.model_fields["name"].default == name
        assert router.config_class is config


def test_train_and_generate_can_be_called_again_and_again(tmp_path):
    for name in ("a", "b"):
        config = tiny_config(tmp_path, run={"dir": str(tmp_path / name)}, training={"steps": 2})
        summary = moeport.train(config, console=Console(quiet=True))
        assert isinstance(moeport.generate(summary.run_dir, "def", max_tokens=2), str)
