"""Stacks of blocks: what numpy reconstructs is what the kernels compute, from Python and as operators in a graph, whose
stack may change between runs; whatever a graph or a caller hands them is computed or refused."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.runtime import kernels
from shoal.runtime.bitstack import layout
from shoal.runtime.bitstack.layout import StackFormat
from shoal.runtime.errors import BackendError, ShoalError, UsageError
from shoal.runtime.kernels.layout import LinearFormat, rotate

pytestmark = pytest.mark.usefixtures("built")

F, I64, U8 = np.float32, np.int64, np.uint8
FORMAT = StackFormat(128, 64, 2, 1)
FORMATS = [
    StackFormat(128, 32, 1, 1), StackFormat(300, 37, 2), StackFormat(64, 16, 4), StackFormat(576, 50, 3, 1),
    StackFormat(100, 33, 16),
]  # fmt: skip
BITS = {None: None, 2: (2, 64), 3: (3, 32), 4: (4, 32), 8: (8, None)}
PATHS = ("scalar", "avx2", "avx512", "amx", "neon", "i8mm")


def random_blocks(format: StackFormat, count: int, seed: int = 1) -> list[bytearray]:
    random = np.random.default_rng(seed)

    def block(level: int) -> bytearray:
        u, v = random.random((format.outputs, format.rank)), random.random((format.rank, format.inputs)) * 0.7**level
        signs = random.random((format.outputs, format.inputs)) < 0.5
        return layout.pack(format, u.astype(np.float16), v.astype(np.float16), signs)

    return [block(level) for level in range(count)]


def random_base(matrix, format: StackFormat, bits: int | None):
    """Its LinearFormat, its bytes and its weights as stored: rotated, where the stack is."""
    if bits is None:
        return None, None, None
    span = 64 * format.blocks
    base = LinearFormat(format.inputs, format.outputs, bits, BITS[bits][1] or span, span, format.rotated)
    data, weights = matrix(base)
    scales = data.reshape(base.panels, -1)[:, : base.groups_at].view(F)
    scales *= F(2**-6)  # of the size of a block
    return base, data, (rotate(weights) if format.rotated else weights) * F(2**-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_product_is_that_of_the_weights_that_numpy_reconstructs(matrix, format, bits):
    base_format, base, stored = random_base(matrix, format, bits)
    payloads, random = random_blocks(format, 3), np.random.default_rng(2)
    bias = random.standard_normal(format.outputs).astype(F)
    for count in range(bits is None, 4):
        weights = layout.reconstruct(format, payloads[:count], stored)
        for rows in (1, 5, 40):
            x = random.standard_normal((rows, format.inputs)).astype(F)
            found = kernels.stacked(format, payloads[:count], x, base_format, base, bias, threads=2) - bias
            error = np.linalg.norm(found - x @ weights.T) / np.linalg.norm(x @ weights.T)
            assert error < 0.03, f"{count} blocks, {rows} rows"  # 8 bits of weights and of activations
            for path in filter(kernels.has, PATHS):
                mine = kernels.stacked(format, payloads[:count], x, base_format, base, bias, path)
                np.testing.assert_array_equal(mine - bias, found)
        ids = np.array([0, format.outputs - 1, 5, 5])
        rows = kernels.stacked_rows(format, payloads[:count], ids, base_format, base)
        if format.rotated:  # summed in another order
            np.testing.assert_allclose(rows, weights[ids], atol=1e-5 * np.abs(weights).max())
        else:
            np.testing.assert_array_equal(rows, weights[ids])


def test_a_row_is_the_same_whatever_is_computed_with_it():
    """Among few rows, which take the signs as they are, and among many, for which panels are rebuilt."""
    payloads, x = random_blocks(FORMAT, 4), np.random.default_rng(2).standard_normal((70, 128)).astype(F)
    for rows, parts in ((8, ((0, 1), (3, 8), (1, 2))), (70, ((0, 9), (1, 16), (20, 70)))):
        found = kernels.stacked(FORMAT, payloads, x[:rows])
        for start, stop in parts:
            mine = kernels.stacked(FORMAT, payloads, x[start:stop], threads=2)
            np.testing.assert_array_equal(mine, found[start:stop])


def test_what_cannot_be_is_refused(matrix):
    payloads, x = random_blocks(FORMAT, 2), np.zeros((2, 128), F)
    base_format, base, _ = random_base(matrix, FORMAT, 4)
    short = [payloads[0], payloads[1][:-1]]
    for wrong in (short, [], payloads * 17):
        with pytest.raises(BackendError, match="format or the size"):
            kernels.stacked(FORMAT, wrong, x)
        with pytest.raises(BackendError, match="format or the size"):
            kernels.stacked_rows(FORMAT, wrong, [0])
    with pytest.raises(BackendError, match="format or the size"):
        kernels.stacked(FORMAT, payloads, x, base_format, base[:-1])
    for rank in (0, -1, 17):
        with pytest.raises(BackendError, match="format or the size"):
            kernels.stacked(StackFormat(128, 64, rank, 1), payloads, x)
    with pytest.raises(UsageError, match="shape"):
        kernels.stacked(FORMAT, payloads, x[:, :-1])
    with pytest.raises(UsageError, match="bias"):
        kernels.stacked(FORMAT, payloads, x, bias=np.zeros(63, F))
    with pytest.raises(BackendError, match="lacks that path"):
        kernels.stacked(FORMAT, payloads, x, path="abacus")
    for row in (-1, 64, 1 << 62):
        with pytest.raises(BackendError, match="out of range"):
            kernels.stacked_rows(FORMAT, payloads, [0, row])
    assert kernels.stacked(FORMAT, payloads, x[:0]).shape == (0, 64)


# In a graph -----------------------------------------------------------------------------------------------------------


def numbers(format: StackFormat, **others) -> dict:
    return {**vars(format), "matrix": 0, **others}


def graph_of(operator, attributes, inputs=(), tensors=(), columns=64):
    given = [("x", F, ["b", "n", 128]), ("stack", I64, [None]), *inputs]
    return operator("StackedLinear", given, [("y", F, ["b", "n", columns])], attributes, tensors)


@pytest.fixture
def stack():
    """stack(matrices): a kernels.Stack, closed at the end."""
    made: list[kernels.Stack] = []

    def make(matrices: int) -> kernels.Stack:
        made.append(kernels.Stack(matrices))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def x():
    return np.random.default_rng(3).standard_normal((2, 9, 128)).astype(F)


def test_a_stack_may_grow_and_shrink_between_runs(operator, matrix, opened, stack, x):
    payloads, other = random_blocks(FORMAT, 4), random_blocks(FORMAT, 1, 7)
    blocks = stack(3)
    blocks.set(1, payloads)
    session = opened(graph_of(operator, numbers(FORMAT, matrix=1)))

    def run(handle=blocks.handle):
        return session.run({"x": x, "stack": np.array([handle])})["y"]

    seen = []
    for now in (payloads, payloads[:1], payloads[:3], other, payloads):
        blocks.set(1, now)
        blocks.set(2, other)
        seen.append(run())
        wanted = kernels.stacked(FORMAT, now, x.reshape(-1, 128)).reshape(2, 9, 64)
        np.testing.assert_array_equal(seen[-1], wanted)
    assert not np.array_equal(seen[0], seen[1]) and np.array_equal(seen[0], seen[-1])
    again = stack(2)
    again.set(1, other)
    np.testing.assert_array_equal(run(again.handle), seen[3])
    assert again.handle > blocks.handle, "a handle is never used twice"
    blocks.set(1, [])
    with pytest.raises(BackendError, match="neither a base nor a block"):
        run()
    blocks.set(1, [payloads[0], payloads[1][:-64]])
    with pytest.raises(BackendError, match="needs"):
        run()
    base_format, base, _ = random_base(matrix, FORMAT, 3)
    for below in ((base_format, base[:-1]), (LinearFormat(128, 64, 8, 128, 128, 1), base)):
        blocks.set(1, payloads, below)
        with pytest.raises(BackendError, match="base"):
            run()
    blocks.set(1, [], (base_format, base))
    wanted = kernels.linear(base_format, base, x.reshape(-1, 128)).reshape(2, 9, 64)
    assert np.linalg.norm(run() - wanted) < 0.01 * np.linalg.norm(wanted)
    blocks.set(1, payloads)
    np.testing.assert_array_equal(run(), seen[0])
    blocks.close()
    buffer = kernels.Buffer(np.zeros(64, U8))
    for handle in (blocks.handle, buffer.handle, 0, -1, 1 << 62):
        with pytest.raises(BackendError, match="no stack"):
            run(handle)
    buffer.close()
    with pytest.raises(BackendError, match="not one"):
        session.run({"x": x, "stack": np.array([again.handle, again.handle])[:0]})


def test_a_stack_refuses_what_it_has_no_place_for(stack):
    payloads = random_blocks(FORMAT, 1)
    for matrices in (0, -1, 1 << 40):
        with pytest.raises(BackendError, match="registered"):
            kernels.Stack(matrices)
    blocks = stack(2)
    for matrix, now in ((2, payloads), (-1, payloads), (1 << 40, payloads), (0, payloads * 33)):
        with pytest.raises(UsageError, match="cannot be changed"):
            blocks.set(matrix, now)
    blocks.set(0, payloads * 32)
    blocks.close()
    with pytest.raises(UsageError, match="closed"):
        blocks.set(0, payloads)


@pytest.mark.parametrize("bits", BITS)
def test_bases_norms_biases_and_residuals(operator, matrix, opened, stack, x, bits):
    base_format, base, stored = random_base(matrix, FORMAT, bits)
    payloads, random = random_blocks(FORMAT, 2), np.random.default_rng(5)
    norm, bias = random.standard_normal(128).astype(F), random.standard_normal(64).astype(F)
    residual = random.standard_normal((2, 9, 64)).astype(F)
    tensors, below = {"norm": norm, "bias": bias}, (base_format, base) if bits else None
    inputs = ["norm", "bias", ("residual", F, ["b", "n", 64])]
    session, blocks = opened(graph_of(operator, numbers(FORMAT, epsilon=1e-5), inputs, tensors)), stack(1)
    for now in (payloads, payloads[:1], payloads[:0] if bits else payloads[1:]):
        blocks.set(0, now, below)
        normed = x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-5) * norm
        product = normed @ layout.reconstruct(FORMAT, now, stored).T
        for part in (slice(0, 1), slice(0, 2)):  # 9 rows, and 18
            given = {"x": x[part], "stack": np.array([blocks.handle]), "residual": residual[part]}
            found = session.run(given)["y"] - bias - residual[part]
            assert np.linalg.norm(found - product[part]) < 0.03 * np.linalg.norm(product[part])


@pytest.mark.parametrize("activation", [1, 2, 3, 4])
def test_gates_and_ups_alternate(operator, opened, stack, x, activation):
    payloads, x = random_blocks(FORMAT, 3), x / F(30)
    blocks = stack(1)
    blocks.set(0, payloads)
    stacked = opened(graph_of(operator, numbers(FORMAT, activation=activation), columns=32))
    plain = kernels.stacked(FORMAT, payloads, x.reshape(-1, 128))
    gate, up = (plain.reshape(2, 9, 2, 2, 16)[:, :, :, at].reshape(2, 9, 32) for at in (0, 1))
    found = stacked.run({"x": x, "stack": np.array([blocks.handle])})["y"]
    if activation in (1, 4):
        acted = gate / (1 + np.exp(-gate)) if activation == 1 else np.maximum(gate, 0)
        np.testing.assert_allclose(found, acted * up, rtol=1e-5, atol=1e-6)
    else:
        tanh = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        np.testing.assert_allclose(found, tanh * up, rtol=1e-5, atol=2e-3 * np.abs(up).max())


@pytest.mark.parametrize("bits", [None, 4])
def test_rows_of_a_stacked_table(operator, matrix, opened, stack, bits):
    base_format, base, stored = random_base(matrix, FORMAT, bits)
    inputs = [("ids", I64, ["b", "n"]), ("stack", I64, [1])]
    session = opened(operator("StackedRows", inputs, [("y", F, ["b", "n", 128])], numbers(FORMAT, factor=2.5)))
    payloads, blocks, below = random_blocks(FORMAT, 3), stack(1), (base_format, base) if bits else None
    ids = np.random.default_rng(1).integers(0, 64, (3, 41))
    for count in (3, 1):
        blocks.set(0, payloads[:count], below)
        weights = layout.reconstruct(FORMAT, payloads[:count], stored)
        found = session.run({"ids": ids, "stack": np.array([blocks.handle])})["y"]
        np.testing.assert_allclose(found, 2.5 * weights[ids], atol=2e-5 * np.abs(weights).max())
    for wrong in (-1, 64, 1 << 40):
        ids[1, 7] = wrong
        with pytest.raises(BackendError, match="no row"):
            session.run({"ids": ids, "stack": np.array([blocks.handle])})
    with pytest.raises(BackendError, match="no stack"):
        session.run({"ids": ids[:1], "stack": np.array([blocks.handle + 1])})


WILD = st.sampled_from([-(2**63), -(2**31), -1, 0, 1, 2, 3, 4, 8, 16, 17, 31, 32, 48, 64, 96, 128, 2**20, 2**31, 2**62])
CALM = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@CALM
@given(
    st.fixed_dictionaries({}, optional={key: WILD for key in numbers(FORMAT, activation=0)}),
    st.lists(st.sampled_from([0, 1, 64, 127, 128, 3000, 4224]), max_size=3), st.booleans(), st.integers(0, 3),
    st.integers(0, 9000), st.sampled_from([None, 2, 3, 4, 8]),
)  # fmt: skip
def test_nothing_that_is_said_of_a_stack_breaks_it(operator, opened, attributes, lengths, rows, stale, base, bits):
    """Whatever comes, there is an answer or a refusal; a crash would end this process."""
    blocks = kernels.Stack(2)
    below = LinearFormat(128, 64, bits, BITS[bits][1] or 128, 128, 1) if bits else None
    blocks.set(0, [np.zeros(length, U8) for length in lengths], (below, np.zeros(base, U8)) if below else None)
    name, x = ("StackedRows", np.zeros((3,), I64)) if rows else ("StackedLinear", np.ones((3, 128), F))
    inputs = [("x", x.dtype, [None] * x.ndim), ("stack", I64, [None])]
    try:
        with opened(operator(name, inputs, [("y", F, None)], numbers(FORMAT) | attributes)) as session:
            session.run({"x": x, "stack": np.array([blocks.handle + stale // 3])})
    except ShoalError:
        pass
    finally:
        blocks.close()
