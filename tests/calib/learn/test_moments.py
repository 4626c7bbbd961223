"""What channels' errors do to the outputs together is what they do, and errors that are fed back do less."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

from postquant.calib.activation_levels import quantizer_with_levels
from postquant.calib.feedback import feedback_of, within_places
from postquant.calib.input_spec import input_specs
from postquant.calib.learn.moments import FeedbackSite, Moments, feedback_sites, measure_moments
from postquant.calib.open_source import open_source
from postquant.passes.plan import QuantPlan
from postquant.runtime_ops.errors import ModelError
from postquant.runtime_ops.law_feedback import Feedback
from postquant.runtime_ops.spec import QuantSpec

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
W0, W1, W2 = (RNG.standard_normal(shape).astype(np.float32) for shape in [(6, 3, 1, 1), (6, 6, 1, 1), (1, 6, 1, 1)])
# The layer `one` reads r, and so does the sum: only the layer's reading is quantized.
NETWORK = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, H, W] x) => (float[N, 1, H, W] y)
      <float[6, 3, 1, 1] w0, float[6, 6, 1, 1] w1, float[1, 6, 1, 1] w2>
    {
      c = Conv (x, w0)
      r = Relu (c)
      [one] d = Conv (r, w1)
      a = Add (d, r)
      [two] y = Conv (a, w2)
    }
"""
QUANTIZER = quantizer_with_levels(
    QuantSpec(3, signed=False, symmetric=False), np.linspace(0, 3, 8)[None] * np.linspace(0.5, 1, 6)[:, None], -3
)


def _model(text: str = NETWORK) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    for name, array in (("w0", W0), ("w1", W1), ("w2", W2)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def _measured(model: ir.Model, xs: list[np.ndarray], sites: list[FeedbackSite]) -> dict[str, Moments]:
    source = open_source([{"x": x.astype(np.float32)} for x in xs], input_specs(model))
    return measure_moments(model, sites, source, range(len(xs)), seed=0, device=CPU)


def whole(moments: Moments) -> np.ndarray:
    """H of all samples, of errors that know nothing of other places."""
    return within_places(np.add(*moments.halves), moments.cell)


def test_it_is_the_second_moment_of_the_outputs_gradient_along_what_is_read() -> None:
    xs = [RNG.standard_normal((1, 3, 4, 5)) for _ in range(7)]
    site = FeedbackSite("r", ("one:0",), QUANTIZER)
    found = _measured(_model(), xs, [site])["r"]
    # y has one channel: a place's gradient is w2 w1, whatever its sign, and the way through the sum does not count.
    gradient = (W2[:, :, 0, 0] @ W1[:, :, 0, 0]).astype(np.float64)
    np.testing.assert_allclose(whole(found), 7 * 20 * gradient.T @ gradient, rtol=1e-4, atol=1e-4)
    r = np.maximum(np.einsum("oc,nchw->nohw", W0[:, :, 0, 0], np.concatenate(xs).astype(np.float32)), 0)
    noise = np.square(QUANTIZER.simulate(r) - r).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(found.noise, noise, rtol=1e-3)


def test_fed_back_errors_change_the_outputs_less() -> None:
    xs = [RNG.standard_normal((1, 3, 8, 8)) for _ in range(8)]
    found = _measured(_model(), xs, [FeedbackSite("r", ("one:0",), QUANTIZER)])["r"]
    feedback = feedback_of(whole(found), found.noise, float(QUANTIZER.scale))
    r = np.maximum(np.einsum("oc,nchw->nohw", W0[:, :, 0, 0], RNG.standard_normal((9, 3, 8, 8)).astype(np.float32)), 0)
    r = np.minimum(r, 1.4).astype(np.float32)
    gradient = (W2[:, :, 0, 0] @ W1[:, :, 0, 0])[0]

    def harm(feedback: Feedback | None) -> float:
        error = dataclasses.replace(QUANTIZER, feedback=feedback).simulate(r) - r
        return float(np.square(np.einsum("c,nchw->nhw", gradient, error)).sum())

    assert harm(feedback) < 0.5 * harm(None)


def test_sites_are_what_layers_read_through_code_books_of_channels() -> None:
    shared = quantizer_with_levels(QuantSpec(3, signed=False, symmetric=False), np.linspace(0, 3, 8))
    plan = QuantPlan("t", requants={"one:0": QUANTIZER, "two:0": shared})
    assert [(site.value, site.keys) for site in feedback_sites(_model(), plan)] == [("r", ("one:0",))]


def test_a_network_that_torch_does_not_run_is_named() -> None:
    model = _model(NETWORK.replace("Relu (c)", "Shrink (c)"))
    with pytest.raises(ModelError, match="Shrink"):
        _measured(model, [np.ones((1, 3, 2, 2))], [FeedbackSite("r", ("one:0",), QUANTIZER)])
