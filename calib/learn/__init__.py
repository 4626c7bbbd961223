"""Learning, block by block: codes, scales, biases and steps that bring a block's output close to its float output.

Everything here computes in torch (extra ``learn``); :func:`postquant.calib.learn.available.require_torch` says so in
one sentence where it is missing. Only the modules ``available`` and ``recipe`` may be imported without it, as the
settings do.
"""
