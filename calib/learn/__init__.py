"""Learning, block by block: rounding, borders and steps that make a block's output equal its float output.

Everything here computes in torch (extra ``learn``); :func:`postquant.calib.learn.available.require_torch` says so in
one sentence where it is missing. Only the modules ``available`` and ``recipe`` may be imported without it, as the
settings do.
"""
