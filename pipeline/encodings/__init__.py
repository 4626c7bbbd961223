"""Quantization parameters in the formats of vendors' tool chains, written from a plan and read back.

:mod:`postquant.pipeline.encodings.formats` lists the formats. Every file is about the float model beside it
(:mod:`postquant.pipeline.encodings.float_model`), whose weights are those of the plan. What a format cannot say is
told in ``index.json``, tensor by tensor.
"""
