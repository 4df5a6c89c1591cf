"""Recipes: the named ones, one from a file, and every way in which a file can be wrong."""

import json

import pytest

from shoal.converters import recipe
from shoal.converters.recipe import NAMED, Calibration, Format, Recipe
from shoal.runtime.errors import UsageError


@pytest.fixture
def load(tmp_path):
    """load(text): the recipe of a file of that text."""

    def from_text(text: str | bytes) -> Recipe:
        path = tmp_path / "mine.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return recipe.load(path)

    return from_text


def test_a_file_says_what_a_recipe_can_say(load):
    found = load("""
        method = "gptq"
        embedding = { bits = 8, symmetric = true }
        [linear]
        bits = 4
        group = 64
        [rules]
        "*.0.*.down_proj.weight" = { bits = 8 }
        "*.down_proj.weight" = {}
        [calibration]
        tokens = 1024
        length = 128
    """)
    assert found == Recipe(
        "mine", linear=Format(4, 64), embedding=Format(8, symmetric=True), method="gptq",
        rules=(("*.0.*.down_proj.weight", Format(8)), ("*.down_proj.weight", Format())),
        calibration=Calibration("", 1024, 128),
    )  # fmt: skip
    # The first rule that matches outranks the role
    assert found.format("model.layers.0.mlp.down_proj.weight") == Format(8)
    assert found.format("model.layers.1.mlp.down_proj.weight", "head") == Format(32)
    assert found.format("model.layers.1.mlp.up_proj.weight") == Format(4, 64)
    assert found.format("model.embed_tokens.weight", "embedding") == Format(8, 32, True)
    assert recipe.load(found) is found
    assert json.loads(found.to_json())["linear"] == {"bits": 4, "group": 64, "symmetric": False}


def test_an_empty_file_is_the_plain_recipe(load):
    assert load("") == Recipe("mine") and all(recipe.load(name).name == name for name in NAMED)


WRONG = {
    "not TOML": ("bits = ", "is not TOML"),
    "not UTF-8": (b"name = '\xff'", "is not TOML"),
    "a key twice": ("method = 'rtn'\nmethod = 'rtn'", "is not TOML"),
    "too deep": ("name = " + "[" * 100_000, "is not TOML"),
    "a number too long": ("version = 1" + "0" * 9999, "is not TOML"),
    "unknown field": ("format = 'int4'", "unknown field 'format'"),
    "unknown field of a format": ("linear = { bit = 4 }", "linear has an unknown field 'bit'"),
    "unknown field of a rule": ("[rules]\n'*' = { bit = 4 }", "unknown field 'bit'"),
    "unknown field of calibration": ("[calibration]\nrows = 4", "unknown field 'rows'"),
    "version": ("version = 2", "version is 2"),
    "method": ("method = 'awq'", "method is 'awq'"),
    "bits": ("linear = { bits = 3 }", "bits is 3"),
    "bits as text": ("linear = { bits = '4' }", "linear.bits is '4'"),
    "bits as a float": ("linear = { bits = 4.0 }", "linear.bits is 4.0"),
    "bits as a truth": ("linear = { bits = true }", "linear.bits is True"),
    "group": ("linear = { bits = 4, group = 48 }", "group is 48"),
    "symmetric": ("linear = { symmetric = 1 }", "linear.symmetric is 1"),
    "name": ("name = 4", "recipe.name is 4"),
    "a format that is no table": ("linear = 4", "linear is not a table"),
    "a rule that is no table": ("[rules]\n'*' = 4", "* is not a table"),
    "rules that are no table": ("rules = [4]", "rules is not a table"),
    "calibration that is no table": ("calibration = 'text'", "calibration is not a table"),
    "no tokens": ("[calibration]\ntokens = 0", "0 tokens"),
    "rows too short": ("[calibration]\nlength = 8", "rows of 8"),
    "rows too long": ("[calibration]\ntokens = 100000\nlength = 10000", "rows of 10000"),
    "more tokens than a machine": ("[calibration]\ntokens = 100000000", "100000000 tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_the_field_that_is_wrong(load, name):
    text, said = WRONG[name]
    with pytest.raises(UsageError) as caught:
        load(text)
    assert said in f"{caught.value.what} {caught.value.why}" and caught.value.fix


@pytest.mark.parametrize("name", ["int3", "", "absent.toml", ".", "folder.toml", "a\0b.toml", None, 4, b"int4"])
def test_what_names_no_recipe_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError):
        recipe.load(name)
