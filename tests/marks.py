"""What several files of tests are skipped for."""

from __future__ import annotations

import pytest
import torch

from engines.torch_linear import can_scale_rows

needs_scales_of_rows = pytest.mark.skipif(
    not can_scale_rows(torch.device("cpu")),
    reason=f"PyTorch {torch.__version__} multiplies no FP8 matrices with a scale per row on a CPU",
)
