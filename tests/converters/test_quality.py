"""What rounding costs on real weights, over text that no calibration saw: against the source in fp32, and against
llama.cpp's Q4_0 of the same source, which runs here with exact activations."""

import json

import gguf
import pytest

from shoal.converters import architectures, parity
from shoal.converters.convert import build, convert
from shoal.converters.sources import open_source
from shoal.converters.text import HELDOUT
from shoal.converters.walk import Scratch
from shoal.runtime.language.tokens import Tokenizer

pytestmark = pytest.mark.deep


def write_q4_0(source, out) -> None:
    """The GGUF `source` with the blocks' matrices in Q4_0, its embedding and head in Q8_0, and all else as it was."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if len(tensor.shape) == 2 and min(tensor.shape) > 1:
            kind = gguf.GGMLQuantizationType.Q4_0 if ".blk." in f".{tensor.name}" else gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fidelity(source, converted, folder) -> parity.Parity:
    """How far the checkpoint `converted`, in fp32, is from `source`."""
    with open_source(source) as expected, open_source(converted) as found, Scratch(found, folder) as scratch:
        architecture, card = architectures.find(expected)
        graph = build(architecture, card, scratch.weights)
        tokenizer = Tokenizer.from_json(expected.tokenizer())
        return parity.compare(
            expected, architecture, card, scratch.weights, graph, scratch.places, tokenizer, HELDOUT, folder
        )


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_calibrated_rounding_beats_nearest_and_q4_0(request, tmp_path, name):
    source = request.getfixturevalue(f"{name}_gguf")
    report = convert(source, tmp_path / "gptq.shoal", "int4-gptq")
    write_q4_0(source, tmp_path / "q4_0.gguf")
    other = fidelity(source, tmp_path / "q4_0.gguf", tmp_path)
    print(json.dumps({"gptq": report.parity, "nearest": report.baseline, "q4_0": other.to_dict()}))
    for rival in (report.baseline, other.to_dict()):
        assert report.parity["kl"] < rival["kl"]
        assert report.parity["perplexity"] < rival["perplexity"]


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_eight_bits_agree(request, tmp_path, name):
    report = convert(request.getfixturevalue(f"{name}_gguf"), tmp_path / "int8.shoal", "int8")
    print(json.dumps(report.parity))
    assert report.parity["top1_agreement"] > 0.97
