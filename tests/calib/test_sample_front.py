"""Values that are computed from kept ones equal a run of the whole network."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from postquant.calib.sample_front import SampleFront
from postquant.passes.session import make_session

# Two branches, an integer value, and a second output that the first one's branch does not feed.
NETWORK = """<ir_version: 8, opset_import: ["" : 17]>
m (float[N,4] x) => (float[N,4] y, float[N,4] z) {
    a = Exp (x)
    b = Neg (a)
    best = ArgMax <axis = 1> (a)
    f = Cast <to = 1> (best)
    c = Mul (b, f)
    y = Add (c, a)
    d = Tanh (x)
    z = Neg (d)
}"""
SAMPLES = [{"x": np.random.default_rng(seed).normal(size=(1, 4)).astype(np.float32)} for seed in range(5)]
ASKED = [["x"], ["a"], ["b", "best"], ["c", "a"], ["d"], ["y"], ["z", "x"], ["a"]]


@pytest.mark.parametrize("room", [0, 5 * 16, 5 * 40, 1 << 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_values_are_those_of_the_whole_network(room: int, threads: int) -> None:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(NETWORK)))
    front = SampleFront(model, SAMPLES, threads=threads, most_bytes=room)
    for names in ASKED:
        values = front.at(names)
        whole = make_session(model, outputs=[name for name in names if name != "x"] or ["y"])
        for index, sample in enumerate(SAMPLES):
            expected = {**whole.run(sample), **sample}
            found = values(index)
            assert set(found) == set(names)
            for name in names:
                np.testing.assert_array_equal(found[name], expected[name])


def test_what_is_kept_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(NETWORK)))
    front = SampleFront(model, SAMPLES)
    front.at(["b", "best"])
    cuts = []

    def recorded(model: ir.Model, **options: list[str]) -> object:
        cuts.append(options["inputs"])
        return make_session(model, inputs=["b", "best"], outputs=options["outputs"], dtypes={"best": ir.DataType.INT64})

    monkeypatch.setattr("postquant.calib.sample_front.make_session", recorded)
    front.at(["c"])  # from b and best alone
    assert set(cuts[0]) == {"b", "best", "x"}
    front.at(["b"])
    assert len(cuts) == 1
