"""INT8 linear layers with ONNX Runtime's dynamic quantisation."""

from __future__ import annotations

import logging
from pathlib import Path

from ..errors import LTMPError, MissingExtraError, first_line


def quantize(source: Path, target: Path) -> None:
    """Write `source` with 8-bit weights, one scale per output channel; activations are quantised dynamically per batch.

    Products of two activations stay in float32, because attention maps, cosine similarities and merging decide which
    tokens are kept.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        LTMPError: quantisation fails.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export", "quantisation") from error
    logging.getLogger().addFilter(_no_advice)
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    except Exception as error:
        raise LTMPError(f"ONNX Runtime cannot quantise this model: {first_line(error)}") from error
    finally:
        logging.getLogger().removeFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    """Filter out the advice to pre-process the model, which the exporter has optimised already."""
    return "pre-processing" not in record.getMessage()
