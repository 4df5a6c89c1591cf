"""Where nodes run and why some do not: pure, on logs as the providers write them."""

import pytest

from shoal.runtime import backends
from shoal.runtime.backends.placement import Node, Placement, place, reasons, required
from shoal.runtime.backends.provider import UNKNOWN, Operator, Verdict
from shoal.runtime.errors import BackendError, UsageError
from shoal.runtime.providers import CPU, Assigned

QNN = "QNNExecutionProvider"
LOG = [
    "Validation PASSED for 1 nodes in OrtNodeUnit (MatMul) :\n\tOperator type: MatMul Node name: mm Node index: 0\n",
    "Validation FAILED for 1 nodes in OrtNodeUnit (Det) :\n\tOperator type: Det Node name: a/det 1 Node index: 2\n"
    "\tREASON : Operators of type `Det` are not supported by QNN EP.Det node `a/det 1` will not be assigned to it.\n",
    "Validation FAILED for 1 nodes in OrtNodeUnit (Relu) :\n\tOperator type: Relu Node name: r Node index: 5\n"
    "\tREASON : Cannot get shape\n",
    "webgpu kernel not found in registries for Op type: MatMulInteger node name: mmi",
]


def test_the_provider_s_own_reasons_are_found_in_its_log():
    assert reasons(LOG) == {
        ("Det", "a/det 1"): "Operators of type `Det` are not supported by QNN EP",
        ("Relu", "r"): "Cannot get shape",
        ("MatMulInteger", "mmi"): "WebGPU has no kernel for MatMulInteger of these types",
    }
    assert reasons(["", "REASON : x", "Operator type: A Node name:"]) == {}


def test_a_node_that_fell_back_has_the_provider_s_reason_or_the_rule_s():
    assigned = [Assigned(QNN, "MatMul", "", "mm"), *(Assigned(CPU, op, "", name) for op, name in
                [("Det", "a/det 1"), ("Relu", "r"), ("Loop", "l"), ("Tan", "")])]  # fmt: skip

    def judge(node):
        return backends.supports("npu:qnn", Operator(node.op, node.domain, static=False))

    found = place("npu", QNN, assigned, LOG, judge)
    why = {node.op: node.why for node in found.fallen}
    assert why["Det"].startswith("Operators of type `Det`") and "static shapes only" in why["Relu"]
    assert "no Loop" in why["Loop"] and "static" in why["Tan"]
    assert found.share == pytest.approx(1 / 5) and all(node.fix for node in found.fallen)
    silent = place("npu", QNN, assigned[-1:], [], lambda node: UNKNOWN)
    assert "does not say why" in silent.nodes[0].why and "cut the graph" in silent.nodes[0].fix


def nodes(taken, *fallen):
    held = tuple(Node(f"m{index}", "MatMul", "", QNN) for index in range(taken))
    return Placement("npu", QNN, held + fallen)


def test_too_small_a_share_is_refused_with_every_reason():
    fallen = [Node(f"r{index}", "Relu", "", CPU, "it is open", "Close it") for index in range(5)]
    found = nodes(
        13, *fallen, Node("g", "Gelu", "com.microsoft", CPU, "it is open", "Close it"), Node("", "Det", "", CPU)
    )
    found.check(0.65)
    with pytest.raises(BackendError) as refused:
        found.check(0.66)
    assert refused.value.placement is found and refused.value.code == 7
    text = str(refused.value)
    assert "65.0% of the nodes run on the npu, 66.0% must" in text and "at most npu=0.65" in text
    assert "- 5 Relu, 1 com.microsoft.Gelu (r0, r1, r2 and 3 more): it is open. Close it." in text and "1 Det" in text
    assert nodes(0).share == 1.0
    with pytest.raises(BackendError) as refused:
        nodes(0, *fallen).check(0.1)
    assert "at most" not in refused.value.fix


def test_reasons_beyond_a_page_are_counted():
    found = nodes(1, *(Node("n", "Op", "", CPU, f"reason {index}", "do") for index in range(20)))
    with pytest.raises(BackendError) as refused:
        found.check()
    assert "8 more for 8 other reasons" in refused.value.why and refused.value.why.count("\n") == 13


def test_what_is_known_to_fail_is_refused_however_little_is_required():
    def judge(node):
        return Verdict(False, "it is wrong", "Leave it", broken=True) if node.op == "QMoE" else UNKNOWN

    found = place("gpu", QNN, [Assigned(QNN, "QMoE", "", "e"), Assigned(QNN, "Add", "", "a")], [], judge)
    with pytest.raises(BackendError, match="takes nodes that fail there") as refused:
        found.check(0.0)
    assert "it is wrong. Leave it" in refused.value.why


@pytest.mark.parametrize("word", ["npu", "npu=", "npu=x", "npu=1.1", "npu=-1", "npu=nan", "cpu=1", "=1", "tpu=0.5"])
def test_a_share_that_is_none_is_refused(word):
    with pytest.raises(UsageError):
        required([word])


def test_shares_are_read():
    assert required(["npu=0.9", "gpu=1"]) == {"npu": 0.9, "gpu": 1.0}


@pytest.mark.parametrize(
    ("name", "operator", "takes"),
    [
        ("npu:qnn", Operator("QuantizedLinear", "shoal"), False),
        ("gpu:cuda", Operator("StackedLinear", "shoal"), False),
        ("npu:qnn", Operator("MatMul", static=False), False),
        ("npu:openvino", Operator("Loop"), False),
        ("npu:qnn", Operator("RotaryEmbedding", "com.microsoft"), False),
        ("npu:qnn", Operator("RotaryEmbedding"), None),
        ("npu:qnn", Operator("MatMul"), None),
        ("gpu:webgpu", Operator("MultiHeadAttention", "com.microsoft", ("q", "k", "v", "", "mask")), False),
        ("gpu:webgpu", Operator("MultiHeadAttention", "com.microsoft", ("q", "k", "v", "", "", "bias")), None),
        ("gpu:webgpu", Operator("Add", types=("float64",)), False),
        ("cpu:onnxruntime", Operator("NoSuch", "shoal"), False),
        ("cpu:onnxruntime", Operator("MatMul", types=("bfloat16",)), False),
        ("cpu:onnxruntime", Operator("MatMul"), None),
    ],
)
def test_rules_say_why_and_what_would_help(name, operator, takes):
    verdict = backends.supports(name, operator)
    assert verdict.takes is takes and (takes is None or (verdict.why and verdict.fix))


def test_without_the_kernels_the_cpu_does_not_take_ours(without_kernels):
    assert "not there" in backends.supports("cpu:onnxruntime", Operator("QuantizedLinear", "shoal")).why
