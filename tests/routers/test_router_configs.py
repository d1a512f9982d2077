"""The files in configs/routers."""

from pathlib import Path

import pytest

from moeport.config import load_config

FILES = sorted((Path(__file__).parents[2] / "configs" / "routers").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_config_is_accepted_and_names_its_router_with_every_option(path):
    config = load_config(path)
    router = config.model.moe.router
    assert path.stem == router.name or path.stem.startswith(f"{router.name}_")
    assert router.model_fields_set == set(type(router).model_fields)
    assert config.run.dir.name == path.stem
