"""The files in configs/routers."""

from pathlib import Path

import pytest

from moeport.config import load_config
from moeport.routers.base import RouterConfig

FILES = sorted((Path(__file__).parents[2] / "configs" / "routers").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_config_is_accepted_and_names_its_router_with_every_option(path):
    config = load_config(path)
    router = config.model.moe.router
    assert path.stem == router.name or path.stem.startswith(f"{router.name}_")
    assert set(type(router).model_fields) - set(RouterConfig.model_fields) <= router.model_fields_set
    assert config.run.dir.name == path.stem
