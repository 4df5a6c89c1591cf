"""What bench says of a mixture is what its store counted, and its bound follows from what was measured."""

from pathlib import Path

import pytest

import shoal
from shoal import bench, bench_experts
from shoal.converters.convert import convert
from shoal.runtime import kernels
from shoal.runtime.errors import UsageError
from shoal.runtime.experts.store import Options

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.missing()}")
TINY = Path(__file__).parents[1] / "data" / "tiny"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "model.shoal"
    convert(TINY / "olmoe", path, "int8", check_parity=False)
    return path


def test_each_row_adds_up(mixture):
    found = bench_experts.measure(str(mixture), shares=(0.5, 0.25), tokens=16, repetitions=2)
    rows = {(row["arm"], row["share"]): row for row in found["rows"]}
    assert list(rows)[0] == ("resident", 1.0) and len(rows) == 6
    layers = found["experts"] // 8
    for (arm, _), row in rows.items():
        uses = row["hits"] + row["misses"] + row["late"]
        # A run is of one prompt's token too
        assert layers * found["top_k"] * 15 / 16 <= uses <= layers * found["top_k"] * 18 / 16
        assert row["missed_bytes"] == pytest.approx((row["misses"] + row["late"]) * found["record"])
        slowest = max(1 / found["rows"][0]["mean"], row["missed_bytes"] / found["bandwidth"])
        assert row["bound"] == pytest.approx(1 / slowest)
        assert row["belady"] <= row["lru"]
        assert arm == "store" or arm == "resident" or not row["late"]
    assert rows["resident", 1.0]["misses"] < rows["on demand", found["top_k"] / found["experts"]]["misses"]
    assert "storage" in bench_experts.render(found)


def test_a_step_reads_as_many_experts_as_a_token_uses(mixture):
    with shoal.load(mixture, context=100) as model:
        index, section = model.experts.index, model.bundle.section("experts", "records")
        ranges = [(at - section.offset, length) for _, at, length in bench.step_ranges(model)
                  if section.offset <= at < section.offset + section.length]  # fmt: skip
        assert len(ranges) == len({at for at, _ in ranges}) == index.layers * model.card.top_k
        (one,) = {length for _, length in ranges}
        weights = 3 * model.card.hidden * model.card.expert_ffn  # a byte each, and scales
        assert weights < one <= index.precisions[0].record and all(
            at % index.precisions[0].record == 0 for at, _ in ranges
        )


def test_a_rate_bounds_what_is_read(mixture):
    found = bench_experts.measure(
        str(mixture), shares=(0.25,), tokens=8, repetitions=1, options=Options(rate=2_000_000)
    )  # fmt: skip
    assert found["bandwidth"] <= 2_000_000
    for row in found["rows"]:
        assert row["read_bytes"] * row["mean"] <= 2_000_000 * 1.5  # a read that began before the first token


def test_what_is_no_mixture_is_refused(smollm2_bundle):
    with pytest.raises(UsageError, match="no experts"):
        bench_experts.measure(str(smollm2_bundle), shares=(0.5,))
