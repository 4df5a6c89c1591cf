"""Early exits and the filter: confidences that hold on rows that did not fit them, and what is saved."""

import numpy as np
import pytest
import torch

from shoal.converters.split import distil, exits, export
from shoal.converters.split.distil import CUT, Rows, Schedule
from shoal.converters.split.exits import Exit, calibration_error, confidences, curve, fit_temperature
from shoal.converters.split.neural_filter import NeuralFilter, filter_loss, saved, scores, threshold_for
from shoal.runtime.errors import UsageError
from shoal.runtime.session import open_graph


def test_a_temperature_mends_what_an_overconfident_exit_says():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((6000, 8)) * 2
    labels = (truth + rng.gumbel(size=truth.shape)).argmax(1)  # of a softmax of truth
    logits = 3.5 * truth
    temperature = fit_temperature(logits[:2000], labels[:2000])
    assert temperature == pytest.approx(3.5, rel=0.1)
    held, right = logits[2000:], logits[2000:].argmax(1) == labels[2000:]
    assert calibration_error(confidences(held), right) > 0.15
    assert calibration_error(confidences(held, temperature), right) < 0.03
    with pytest.raises(UsageError):
        fit_temperature(logits, labels[:3])


def test_an_exit_of_the_teacher_trades_depth_for_accuracy(teacher):
    torch.manual_seed(0)
    leaves = Exit(32, 10)

    def loss(batch, generator):
        return torch.nn.functional.cross_entropy(leaves(batch[CUT]), batch["label"])

    distil.fit(leaves, list(leaves.parameters()), loss, teacher.train, Schedule(6, 50, 1e-2, cosine=True))
    held = teacher.test.arrays
    with torch.no_grad():
        logits = leaves(torch.from_numpy(held[CUT])).numpy()
    fitted, measured = slice(0, 500), slice(500, None)
    temperature = fit_temperature(logits[fitted], held["label"][fitted])
    confidence = confidences(logits[measured], temperature)
    labels = held["label"][measured]
    early, late = (one[measured].argmax(1) == labels for one in (logits, held["outputs"]))
    assert calibration_error(confidence, early) < 0.08
    points = curve(confidence, early, late, (0.0, 0.5, 0.7, 0.9, 1.01))
    assert points[0].exits == 1 and points[0].accuracy == early.mean()
    assert points[-1].exits == 0 and points[-1].accuracy == late.mean()
    assert [point.exits for point in points] == sorted((point.exits for point in points), reverse=True)
    # Who is sure is right more often: what leaves early at 0.9 is better than the whole lot
    assert early[confidence >= 0.9].mean() > early.mean()
    for halvings in (0, 2):
        assert exits.Exit(3, 2, hidden=4, halvings=halvings)(torch.zeros(2, 3, 5, 5)).shape == (2, 2)


def test_a_filter_keeps_the_recall_it_was_asked_for():
    rng = np.random.default_rng(0)
    present = rng.random(1600) < 0.4
    x = rng.standard_normal((1600, 4, 16, 16)).astype(np.float32)
    x[present, :, 4:8, 4:8] += 1.2 * rng.random((present.sum(), 1, 1, 1)).astype(np.float32)
    torch.manual_seed(0)
    network = NeuralFilter((4, 16, 16), side=16, width=16)
    train = Rows({"input": x[:800], "label": present[:800].astype(int)})
    distil.fit(network, list(network.parameters()), filter_loss(network), train, Schedule(5, 50, 5e-3, cosine=True))
    found = scores(network, Rows({"input": x[800:]}))
    threshold = threshold_for(found[:400], present[800:1200], 0.9)
    assert (found[:400][present[800:1200]] >= threshold).mean() >= 0.9
    recall, nothing = saved(found[400:], present[1200:], threshold)
    assert recall > 0.82 and nothing > 0.4
    assert saved(np.array([0.1, 0.6, 0.7]), np.array([0, 0, 1]), 0.5) == (1, 0.5)
    with pytest.raises(UsageError):
        threshold_for(found, np.zeros(len(found), bool), 0.9)


@pytest.mark.parametrize("feature", [(3, 200, 130), (5, 64, 64), (4, 7, 9)])
@pytest.mark.parametrize("anywhere", [False, True])
def test_a_filter_of_any_feature_is_a_second_output_of_the_head(feature, anywhere):
    torch.manual_seed(0)
    network = NeuralFilter(feature, width=8, anywhere=anywhere).eval()
    x = np.random.default_rng(0).standard_normal((3, *feature)).astype(np.float32)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(feature[0], 2, 1)).eval()
    with open_graph(export.head(encoder, feature, (2, *feature[1:]), gate=network), {}, threads=1) as head:
        found = head.run({"image": x})
        assert list(found) == ["latent", "score"] and head.outputs["score"].dims == ("n",)
    np.testing.assert_allclose(found["score"], scores(network, Rows({"input": x})), atol=1e-5)
    with pytest.raises(UsageError, match="small"):
        NeuralFilter((3, 4, 30))
