"""Thresholds for a budget of bytes: of a real store, with and without a low precision, and what is refused."""

import json

import pytest

from shoal import cli, expert_thresholds
from shoal.converters.convert import convert
from shoal.converters.recipe import Format, Recipe
from shoal.runtime import kernels
from shoal.runtime.errors import UsageError
from shoal.runtime.experts.store import Options

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")
SLOTS, TOKENS = 6, 160  # of 24; a token uses 2 in each of 3 layers
QUIET = Options(guess=False)  # what guesses read depends on how long everything takes


@pytest.fixture(scope="module")
def mixture(tiny_folder, tmp_path_factory):
    """mixture(low) -> a bundle of experts in 8 bits and, with `low`, in 2 as well."""

    def make(low: bool):
        path = tmp_path_factory.mktemp("thresholds") / "mixture.shoal"
        recipe = Recipe("t", linear=Format(8), low=Format(2) if low else None)
        convert(tiny_folder.parent / "qwen3_moe", path, recipe, check_parity=False)
        return path

    return make


@pytest.fixture(scope="module")
def both(mixture):
    return mixture(True)


@pytest.fixture(scope="module")
def plain(mixture):
    return mixture(False)


def calibrate(bundle, budget, **changes):
    return expert_thresholds.calibrate(
        bundle, budget, **{"slots": SLOTS, "tokens": TOKENS, "options": QUIET, "context": 80, "threads": 1} | changes
    )


@pytest.fixture(scope="module")
def ends(both):
    """What is read without thresholds, and least."""
    with pytest.raises(UsageError, match="Answers cannot read as little") as refused:
        calibrate(both, 1)
    assert "low 0 and skip 0.75" in refused.value.why
    exact = calibrate(both, 1 << 40)
    assert exact["found"] is exact["exact"] is None and (exact["low"], exact["skip"]) == (1, 1)
    return exact["runs"][0]["read_bytes"]


def test_what_is_found_keeps_the_budget_and_a_looser_one_gives_up_less(both, ends):
    before = 0.0
    for share in (0.7, 0.85, 0.97):
        found = calibrate(both, int(share * ends))
        chosen = {"low": found["low"], "skip": found["skip"]}
        (run,) = [run for run in found["runs"] if {key: run[key] for key in chosen} == chosen]
        assert run["read_bytes"] <= share * ends
        assert before <= found["low"] < 1 and found["skip"] == pytest.approx(1 - (1 - found["low"]) / 4)
        before = found["low"]
        exact, thrifty = found["exact"], found["found"]
        assert exact["kl"] == exact["low_share"] == exact["skipped_share"] == 0 and exact["top1_agreement"] == 1
        assert thrifty["kl"] > 0 and thrifty["low_share"] > 0
        assert thrifty["read_bytes"] < exact["read_bytes"] and thrifty["perplexity"] != exact["perplexity"]


def test_bytes_of_a_run_are_those_of_the_store(both, ends):
    """Without thresholds the same tokens read the same, whatever else is measured, and a record is whole."""
    again = calibrate(both, 1 << 40)["runs"][0]["read_bytes"]
    assert again == ends > 0
    whole = calibrate(both, 1 << 40, slots=24)["runs"][0]["read_bytes"]
    assert whole < ends / 10  # all are there after the prompt, or once


def test_without_a_low_precision_misses_are_skipped(plain):
    exact = calibrate(plain, 1 << 40)["runs"][0]["read_bytes"]
    found = calibrate(plain, int(0.6 * exact))
    assert found["low"] == 1 and found["skip"] < 1
    assert found["found"]["low_share"] == 0 < found["found"]["skipped_share"] and found["found"]["kl"] > 0
    with pytest.raises(UsageError) as refused:
        calibrate(plain, 1)
    assert "low 1 and skip 0 " in refused.value.why  # the end of this path


def test_the_command_says_what_to_pass(both, capsys):
    words = ["experts", "thresholds", str(both), "--slots", str(SLOTS), "--tokens", str(TOKENS), "--context", "80"]
    assert cli.main([*words, "--budget", "1GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["found"] is None
    # With guesses, as an app has them
    assert cli.main([*words, "--budget", str(int(0.85 * found["runs"][0]["read_bytes"]))]) == 0
    shown = capsys.readouterr().out
    assert "KL divergence" in shown and shown.rstrip().splitlines()[-1].startswith("shoal.load('mixture.shoal', ")
    assert cli.main([*words, "--budget", "1GB"]) == 0
    assert "No thresholds are needed" in capsys.readouterr().out


def test_what_cannot_be_is_refused(plain, tiny_bundle, capsys, tmp_path):
    for change, match in (
        ({"budget": 0}, "budget"), ({"budget": 1.5}, "budget"), ({"tokens": 10}, "tokens"), ({"slots": 25}, "25"),
        ({"memory": "1GB"}, "both given"), ({"text": "Too short."}, "too short"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=match):
            calibrate(plain, **{"budget": 1 << 20} | change)
    with pytest.raises(UsageError, match="no experts"):
        calibrate(tiny_bundle, 1 << 20)
    for words in (["--budget", "much"], ["--budget", "0"], ["--budget", "1MB", "--text", str(tmp_path / "none")]):
        assert cli.main(["experts", "thresholds", str(plain), *words]) == 2
    capsys.readouterr()
