"""What unfinished plans give is measured as the verification measures the final one, where a stage comes next."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from postquant.calib.input_spec import input_specs
from postquant.calib.open_source import open_source
from postquant.passes.place import PlacementSettings
from postquant.passes.target import load_target
from postquant.pipeline.config import Border, Method, QuantConfig
from postquant.pipeline.job import Job
from postquant.pipeline.progress import NullProgress
from postquant.pipeline.report import Report
from postquant.pipeline.stage_log import StageLog
from postquant.pipeline.stage_quality import measure_before_borders, measure_before_search, tensor_sqnr
from postquant.pipeline.verify import verify_model


@pytest.fixture(scope="module")
def narrow(cases: Any) -> Any:
    return cases.build(settings=PlacementSettings(wbits=4, abits=4))


def _job(case: Any, **settings: Any) -> Job:
    report = Report(
        model="m",
        model_sha256="",
        data_sha256="",
        samples=3,
        target="onnxruntime",
        settings={},
        versions={},
        size_before=0,
    )
    source = open_source(case.samples, input_specs(case.model))
    return Job(case.model, source, QuantConfig(**settings), load_target("onnxruntime"), report)


def test_the_numbers_are_those_of_the_verification(narrow: Any) -> None:
    found = tensor_sqnr(_job(narrow), narrow.model, narrow.plan)
    quality = verify_model(narrow.model, narrow.emitted, narrow.plan, narrow.samples).quality
    assert found == pytest.approx({item.name: item.sqnr_db for item in quality}, abs=1e-3)
    assert len(found) > 5


def _stages(case: Any, **settings: Any) -> list[str]:
    log = StageLog(NullProgress())
    job = _job(case, **settings)
    measure_before_search(job, case.model, case.plan, log)
    measure_before_borders(job, case.model, case.plan, log)
    return list(log.tensor_sqnr)


def test_only_where_a_stage_comes_next(cases: Any, narrow: Any) -> None:
    both = ["ranges", "scale search"]
    assert _stages(narrow) == both
    assert _stages(narrow, border=Border.OFF) == ["ranges"]
    assert _stages(narrow, method=Method.MINMAX, border=Border.OFF) == []
    assert _stages(narrow, method=Method.MINMAX, bias_correction=True) == both
    assert _stages(cases.build(), border=Border.ON) == ["ranges"]


def test_borders_follow_the_target(narrow: Any) -> None:
    log = StageLog(NullProgress())
    job = dataclasses.replace(_job(narrow), target=load_target("generic"))
    measure_before_borders(job, narrow.model, narrow.plan, log)
    assert log.tensor_sqnr == {}
