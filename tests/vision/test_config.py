"""Rules of configs with images, and the file in configs/vision."""

from pathlib import Path

import pytest

from moeport.config import load_config
from moeport.errors import UserError
from moeport.routers import BY_NAME

FILE = Path(__file__).parents[2] / "configs" / "vision" / "digits.yaml"


def problem(*overrides):
    with pytest.raises(UserError) as caught:
        load_config(FILE, overrides)
    return str(caught.value)


def test_the_file_is_sound():
    config = load_config(FILE)
    assert config.data.is_images
    assert config.data.tokens_per_sequence == 16


LOOK_AHEAD = [name for name, router in BY_NAME.items() if router.config_class.looks_ahead]


@pytest.mark.parametrize("router", LOOK_AHEAD)
def test_routers_that_look_ahead_have_a_file(router):
    config, plain = load_config(FILE.with_name(f"{router}.yaml")), load_config(FILE)
    assert config.model.moe.router.name == router
    assert config.run.dir.name == router
    moe = plain.model.moe.model_copy(update={"router": config.model.moe.router})
    assert config.model == plain.model.model_copy(update={"moe": moe})
    assert config.model_copy(update={"run": plain.run, "model": plain.model}) == plain


@pytest.mark.parametrize("router", LOOK_AHEAD)
def test_routers_that_look_ahead_are_welcome_on_images_alone(router):
    chosen = f"model.moe.router={{name: {router}}}"
    load_config(FILE, [chosen])
    assert "lets a token's routing depend on later tokens" in problem(chosen, "data.source={name: stdlib}")


def test_routers_of_token_ids_are_refused():
    assert "hash looks at token ids, which the patches of data.source.name digits do not have" in problem(
        "model.moe.router={name: hash}"
    )


def test_patches_must_fill_the_image():
    assert "data.source.patch_size: does not divide the 8 pixels of an image's side (got 3); expected 1, 2, 4 or 8" in (
        problem("data.source.patch_size=3")
    )


@pytest.mark.parametrize(
    "override",
    [
        "data.sequence_length=64",
        "data.tokenizer.name=byte",
        "data.tokenizer.vocab_size=512",
        "model.vocab_size=5000",
        "model.tie_embeddings=true",
        "model.moe.allow_future_tokens=true",
    ],
)
def test_keys_of_text_have_no_effect(override):
    key = override.partition("=")[0]
    assert f"{key}: has no effect while data.source.name is digits" in problem(override)
