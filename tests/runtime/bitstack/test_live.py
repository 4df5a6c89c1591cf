"""A model whose stack grows and shrinks while it answers: what comes out depends on the size it has, and on nothing
that was before."""

import random
import threading

import pytest

import shoal
from shoal.runtime import kernels
from shoal.runtime.errors import BackendError, BudgetError, BundleError, ShoalError, UsageError
from shoal.runtime.language.part import load_part
from shoal.runtime.model import plan

pytestmark = pytest.mark.skipif(not kernels.available(), reason="needs the kernels")
PROMPT = list(range(10, 40))


def answer(model, prompt=PROMPT, count: int = 12) -> list[tuple[int, float]]:
    return [(token.id, token.logprob) for token in model.generate(prompt, max_tokens=count, ignore_end=True)]


@pytest.fixture
def model(tiny_stack):
    with shoal.load(tiny_stack, context=96, slots=2) as model:
        yield model


@pytest.fixture(scope="module")
def fresh(tiny_stack):
    """entries -> the answer of a model that never had another size."""
    found = {}

    def get(entries):
        if entries not in found:
            with shoal.load(tiny_stack, context=96, slots=2) as model:
                model.set_entries(entries)
                found[entries] = answer(model)
        return found[entries]

    return get


def budget(model, entries: int) -> int:
    """The bytes of a plan with so many entries."""
    plan = model.plan
    return plan.total - model.stack.sizes[plan.entries] + model.stack.sizes[entries]


def test_every_size_answers_as_a_fresh_load_of_that_size(model, fresh, tiny_stack):
    floor, most = model.stack.index.floor, len(model.stack.index.order)
    assert model.stack.entries == model.plan.entries == most and model.plan.memory is None
    sizes = [floor, most, floor + 3, most // 2, most - 1, floor, most]
    answers = {}
    for entries in sizes:
        assert model.set_entries(entries).entries == entries == model.stack.entries
        assert answer(model) == fresh(entries) == answers.setdefault(entries, fresh(entries))
    assert len({tuple(found) for found in answers.values()}) == len(answers), "sizes differ"
    memory = plan(tiny_stack, context=96, slots=2).total - 30_000
    with shoal.load(tiny_stack, memory, context=96, slots=2) as small:
        assert floor < small.plan.entries == plan(tiny_stack, memory, context=96, slots=2).entries < most
        assert answer(small) == fresh(small.plan.entries)
        bigger = small.set_memory("1GB")
        assert bigger.entries == most and answer(small) == fresh(most)
        assert small.set_memory(memory).entries == small.stack.entries < most
        assert answer(small) == fresh(small.plan.entries)


def test_rows_of_other_weights_begin_no_later_prompt(model, fresh):
    floor, most = model.stack.index.floor, len(model.stack.index.order)
    assert answer(model) and answer(model)  # the second begins with what the first left
    again = model.generate(PROMPT, max_tokens=1)
    assert again.finish() is not None and again.stats.reused_tokens == len(PROMPT) - 1
    model.set_entries(floor)
    first = model.generate(PROMPT, max_tokens=40, ignore_end=True)
    next(first)
    assert first.stats.reused_tokens == 0
    model.set_entries(most)  # `first` goes on with rows of the floor; nobody may copy them
    other = model.generate(PROMPT, max_tokens=12, ignore_end=True)
    assert [(token.id, token.logprob) for token in other] == fresh(most) and other.stats.reused_tokens == 0
    assert first.finish() is not None and first.stats.generated_tokens == 40
    last = model.generate([*PROMPT, 1], max_tokens=1)
    last.finish()
    assert last.stats.reused_tokens == len(PROMPT), "of `other` alone, whose rows are of now"


def test_answers_go_on_while_threads_resize(model, fresh):
    floor, most = model.stack.index.floor, len(model.stack.index.order)
    low, high = budget(model, floor + 2), budget(model, most)
    stop, errors, counts = threading.Event(), [], []

    def generate():
        while not stop.is_set():
            try:
                counts.append(len(answer(model, PROMPT[: 5 + len(counts) % 20], 30)))
            except ShoalError as error:
                errors.append(error)

    def resize(seed):
        draw = random.Random(seed)
        for _ in range(25):
            try:
                found = model.set_memory(draw.randint(low, high))
                assert found.total <= found.memory
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=generate) for _ in range(2)]
    movers = [threading.Thread(target=resize, args=(seed,)) for seed in range(2)]
    for thread in threads + movers:
        thread.start()
    for thread in movers:
        thread.join()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors and counts and set(counts) == {30}
    assert model.plan.entries == model.stack.entries and model.plan.context == 96
    model.set_entries(floor)  # or the prompt would begin with the rows of others, which fewer rows at a time have made
    model.set_memory(high)
    assert answer(model) == fresh(most)


def test_a_damaged_entry_met_while_answers_go_on(make_stack, int8_bundle, mixed, tmp_path):
    path = make_stack(int8_bundle, tmp_path / "m.shoal", mixed, change=lambda index, data: (
        index.to_json(), data[:-1] + bytes([data[-1] ^ 1])))  # fmt: skip
    whole = plan(path, context=96)
    with shoal.load(path, whole.total - 1, context=96) as model:
        running = model.generate(PROMPT, max_tokens=20, ignore_end=True)
        next(running)
        before = model.plan
        with pytest.raises(BundleError, match="damaged"):
            model.set_memory(whole.total)
        assert model.plan == before and model.stack.entries == before.entries
        assert len([token for token in running]) == 19


def test_only_below_the_floor_the_context_shrinks(tiny_stack):
    with shoal.load(tiny_stack, context=192) as model:
        floor, most = model.stack.index.floor, len(model.stack.index.order)
        least = budget(model, floor)
        assert model.set_memory(least).context == 192 and model.plan.entries == floor
        shorter = model.set_memory(least - 20_000)
        assert shorter.context < 192 and shorter.entries >= floor and model.scheduler.cache.context == shorter.context
        with pytest.raises(BudgetError) as refused:
            model.set_memory(1 << 20)
        assert "its floor" in refused.value.why and model.plan == shorter
        back = model.set_memory("1GB")
        assert (back.context, back.entries) == (192, most)
        # The context that is asked for takes what it needs from the stack, and gives it back
        model.set_memory(budget(model, most - 5))
        longer = model.set_context(256)
        assert longer.context == 256 and longer.entries < most - 5 and longer.total <= longer.memory
        assert model.set_context(192).entries >= most - 5
        running = model.generate(PROMPT, max_tokens=60, ignore_end=True)
        next(running)
        before = model.plan
        with pytest.raises(BudgetError, match="under way"):
            model.set_context(20)
        assert model.plan == before and model.stack.entries == before.entries
        assert len(list(running)) == 59


def test_exact_control_keeps_the_budget_too(model):
    most = len(model.stack.index.order)
    model.set_memory(budget(model, most - 4))
    with pytest.raises(BudgetError):
        model.set_entries(most)
    for wrong in (-1, 0, most + 1, 1.5):
        with pytest.raises(UsageError):
            model.set_entries(wrong)
    assert model.set_entries(most - 6).entries == most - 6 and model.plan.memory is not None


def test_rows_are_measured_apart(model):
    rows = model.measure()
    assert rows["stack"] is None or model.stack.bytes <= rows["stack"] < model.stack.bytes + (1 << 18)
    assert rows["weights"] is None or rows["weights"] < 1 << 20


@pytest.mark.parametrize("load", [shoal.load, load_part])
def test_a_model_closed_while_it_grows(tiny_stack, monkeypatch, load):
    model = load(tiny_stack, context=96)
    most = len(model.stack.index.order)
    model.set_entries(model.stack.index.floor)
    reached, go, refused = threading.Event(), threading.Event(), []
    check = shoal.runtime.bitstack.stack.check

    def slow(*arguments):
        reached.set()
        go.wait(10)
        check(*arguments)

    monkeypatch.setattr(shoal.runtime.bitstack.stack, "check", slow)

    def grow():
        try:
            model.set_entries(most)
        except BackendError as error:
            refused.append(error)

    growing = threading.Thread(target=grow)
    growing.start()
    assert reached.wait(10)
    closing = threading.Thread(target=model.close)
    closing.start()
    while not model.stack._closing:
        pass
    go.set()
    growing.join(20)
    closing.join(20)
    assert refused and not growing.is_alive() and not closing.is_alive()
    with pytest.raises(BackendError):
        model.set_entries(most)
    model.close()


def test_a_part_has_its_size_too(tiny_stack, fresh):
    with load_part(tiny_stack, context=96) as part:
        first = part.forward(0, PROMPT, 0)
        part.set_entries(part.stack.index.floor)
        small = part.forward(0, PROMPT, 0)
        part.set_entries(len(part.stack.index.order))
        assert (part.forward(0, PROMPT, 0) == first).all() and (small != first).any()


def test_an_encoder_has_its_size_too(tiny_folder, make_stack, mixed, tmp_path):
    shoal.convert(tiny_folder.parent / "bert-mean", tmp_path / "a.shoal", "int8", check_parity=False)
    path = make_stack(tmp_path / "a.shoal", tmp_path / "b.shoal", mixed)
    whole = plan(path)
    with shoal.load(path) as model:
        first = model.embed(["hello world", "no"])
        assert model.set_entries(model.stack.index.floor).entries == model.stack.entries < whole.entries
        assert (model.embed(["hello world", "no"]) != first).any()
        model.set_entries(whole.entries)
        assert (model.embed(["hello world", "no"]) == first).all()
    with shoal.load(path, whole.total - 1) as small:
        assert small.plan.entries == small.stack.entries < whole.entries


def test_a_model_without_a_stack_has_none(int8_bundle):
    with shoal.load(int8_bundle, context=64) as model:
        assert model.stack is None and model.plan.entries == 0
        with pytest.raises(UsageError, match="no stack"):
            model.set_entries(1)
