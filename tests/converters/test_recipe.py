"""Recipes: the named ones, one from a file, and every way in which a file can be wrong."""

import dataclasses
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
        span = 512
        [rules]
        "*.0.*.down_proj.weight" = { bits = 8 }
        "*.down_proj.weight" = {}
        [calibration]
        tokens = 1024
        length = 128
    """)
    assert found == Recipe(
        "mine", linear=Format(4, 64, span=512), embedding=Format(8, symmetric=True), method="gptq",
        rules=(("*.0.*.down_proj.weight", Format(8)), ("*.down_proj.weight", Format())),
        calibration=Calibration("", 1024, 128),
    )  # fmt: skip
    # The first rule that matches outranks the role
    assert found.format("model.layers.0.mlp.down_proj.weight") == Format(8)
    assert found.format("model.layers.1.mlp.down_proj.weight", "head") == Format(32)
    assert found.format("model.layers.1.mlp.up_proj.weight") == Format(4, 64, span=512)
    assert found.format("model.embed_tokens.weight", "embedding") == Format(8, 0, True)
    assert recipe.load(found) is found
    assert json.loads(found.to_json())["linear"] == {
        "bits": 4, "group": 64, "symmetric": False, "span": 512, "rotated": True,
    }  # fmt: skip


def test_an_empty_file_is_the_plain_recipe(load):
    assert load("") == Recipe("mine") and all(recipe.load(name).name == name for name in NAMED)


def test_a_format_needs_its_bits_alone():
    assert [str(Format(bits)) for bits in (32, 8, 4, 3, 2)] == ["fp32", "int8", "int4g32", "int3g32", "int2g32"]
    assert Format(4) == Format(4, 32) and str(Format(4, 64, True, 256)) == "int4g64x256s"
    assert str(Format(8, 128)) == "int8g128"


@pytest.mark.parametrize(
    "format, inputs, group, span",
    [
        (Format(4), 896, 32, 896),
        (Format(4), 100, 32, 128),  # a row is padded to whole blocks
        (Format(4, 256), 896, 128, 896),  # the longest group that divides the row
        (Format(4, 256), 576, 64, 576),
        (Format(4, 64, span=512), 4864, 64, 512),
        (Format(4, 64, span=512), 300, 64, 320),
        (Format(3), 100_000, 32, 65536),  # int32 holds no more
        (Format(8), 896, 896, 896),
        (Format(8, 32), 896, 64, 64),
        (Format(8, 128), 300, 128, 128),
        (Format(8, 256), 100, 128, 128),
        (Format(8), 100_000, 65536, 65536),
    ],
)
def test_a_format_fits_any_matrix(format, inputs, group, span):
    shape = format.layout(inputs, 10).check()
    assert (shape.inputs, shape.outputs, shape.bits, shape.group, shape.span) == (inputs, 10, format.bits, group, span)
    assert shape.rotated == (inputs % 64 == 0)  # a row of whole blocks
    assert not dataclasses.replace(format, rotated=False).layout(inputs, 10).check().rotated


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
    "bits": ("linear = { bits = 5 }", "bits is 5"),
    "bits as text": ("linear = { bits = '4' }", "linear.bits is '4'"),
    "bits as a float": ("linear = { bits = 4.0 }", "linear.bits is 4.0"),
    "bits as a truth": ("linear = { bits = true }", "linear.bits is True"),
    "group": ("linear = { bits = 4, group = 48 }", "group is 48"),
    "group below none": ("linear = { bits = 4, group = -32 }", "group is -32"),
    "span": ("linear = { bits = 4, span = 100 }", "span is 100"),
    "span below none": ("linear = { bits = 4, span = -64 }", "span is -64"),
    "span that a group does not divide": ("linear = { bits = 4, group = 128, span = 192 }", "span is 192"),
    "span beyond int32": ("linear = { bits = 4, span = 65600 }", "span is 65600"),
    "span of eight bits": ("linear = { bits = 8, span = 128 }", "span is 128 with 8 bits"),
    "symmetric": ("linear = { symmetric = 1 }", "linear.symmetric is 1"),
    "rotated": ("linear = { bits = 4, rotated = 'yes' }", "linear.rotated is 'yes'"),
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
