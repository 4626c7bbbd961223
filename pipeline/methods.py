"""What settings name: a range method (:func:`range_method`), code books of weights (:func:`code_books`)."""

from __future__ import annotations

from postquant.calib.code_book import CodeBooks
from postquant.calib.entropy import Entropy
from postquant.calib.lp_error import LpError
from postquant.calib.observers import MinMax, Percentile, RangeMethod
from postquant.calib.table_search import LARGEST_LEVEL
from postquant.passes.target import Target, WeightStorage
from postquant.pipeline.config import Method, QuantConfig, Weights
from postquant.runtime_ops.code_book import CODE_BITS, CodeBook
from postquant.runtime_ops.errors import ConfigError


def range_method(config: QuantConfig) -> RangeMethod | None:
    """The method, or None for EasyQuant, which chooses per tensor by the effect on the outputs."""
    match config.method:
        case Method.MINMAX:
            return MinMax()
        case Method.MSE:
            return LpError(config.lp)
        case Method.ENTROPY:
            return Entropy()
        case Method.PERCENTILE:
            return Percentile(config.percentile)
    return None


def code_books(config: QuantConfig, target: Target) -> CodeBooks:
    """Which values weights of few bits may have.

    Raises:
        ConfigError: If the settings ask for a code book that the target or the container cannot have.
    """
    largest = min((1 << (min(target.weights.max_bits, 8) - 1)) - 1, LARGEST_LEVEL)
    storage = config.weight_storage or target.weight_storage
    if config.post_exact and storage is not WeightStorage.PACKED:
        raise ConfigError(
            "post_exact needs the packed operators",
            where=f"target {target.name}",
            expected='weight_storage = "packed"',
            found=f'"{storage.value}"',
        )
    if config.weights in (Weights.AUTO, Weights.INT):
        plain = config.weights is Weights.INT or storage is WeightStorage.INT4
        return CodeBooks(frozenset({CodeBook.UNIFORM} if plain else CodeBook), largest)
    book = CodeBook(config.weights.value)
    reason = None
    if storage is WeightStorage.INT4:
        reason = "INT4 holds uniform codes only"
    elif not CodeBooks(frozenset({book}), largest).allow(book, min(CODE_BITS)):
        reason = f"the largest level is {largest}: {target.weights.max_bits_reason}"
    if reason is not None:
        raise ConfigError(
            f'weights = "{book.value}" cannot be had', where=f"target {target.name}", found=reason, hint='use "auto"'
        )
    return CodeBooks(frozenset({book}), largest)
