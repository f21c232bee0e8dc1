"""Writes a model as an ONNX graph from ids to logits, and runs it with ONNX Runtime if that is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

import torch
from transformers import PreTrainedModel

from secateur.errors import InputError, ModelError, VerificationError
from secateur.export.agreement import agreement, sample_ids
from secateur.loading import quiet_transformers

_TOLERANCE = 1e-3
"""Largest difference of logits in float32, as a fraction of the largest. The graph and the kernels differ."""


class _Logits(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def write_onnx(model: PreTrainedModel, folder: Path) -> str:
    """Write ``model.onnx`` and its weights, in float32, into ``folder``, which exists. Returns what was checked.

    Inputs are ``input_ids`` and ``attention_mask`` ``[batch, length]``, the output is ``logits``; There is no cache: it
    is fit for scoring and classification, but generates slowly. Layers may differ in size. Raises InputError without
    onnx and onnxscript, ModelError when the graph cannot be made, and VerificationError when it computes something
    else.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{package} is not installed, and ONNX graphs need it. Install it: pip install 'secateur[formats]'"
            )
    model = model.float().cpu().eval()
    ids = sample_ids(model.config)
    mask = torch.ones_like(ids)
    file = folder / "model.onnx"
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    axes = {0: batch, 1: length}
    try:
        # the exporter prints its steps
        with quiet_transformers(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            torch.onnx.export(
                _Logits(model),
                (ids, mask),
                file,
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": axes, "attention_mask": axes},
                external_data=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many errors for an operator that it does not know
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"torch cannot make an ONNX graph of this {model.config.model_type} model: {first[:300]}"
        ) from error
    return _check(model, file)


def _check(model: PreTrainedModel, file: Path) -> str:
    """Run the graph on text of another length than in its export, padded on the left, and compare."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "Not run: onnxruntime is not installed here (pip install onnxruntime)."
    import onnxruntime

    ids = sample_ids(model.config, 17).repeat(2, 1)[:3]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if found.shape != expected.shape:
        raise VerificationError(
            f"ONNX Runtime opens the graph and computes something else: logits of shape {list(found.shape)} instead of "
            f"{list(expected.shape)}."
        )
    seen = mask.bool()
    difference, scale, good = agreement(found[seen], expected[seen], _TOLERANCE)
    if not good:
        raise VerificationError(
            f"ONNX Runtime opens the graph and computes something else: logits differ by {difference:.3g} of "
            f"{scale:.1f}."
        )
    return f"ONNX Runtime opens it: logits differ by at most {difference:.1e} of {scale:.1f}."
