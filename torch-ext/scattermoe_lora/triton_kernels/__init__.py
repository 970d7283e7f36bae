"""The GPU backend: five kernel families in Triton, names, arguments and results as in `reference`'s second half."""

from .combine import combine
from .gram import gram
from .grouped_gemm import grouped_gemm, grouped_gemm_act, grouped_gemm_act_grad
from .route import route, schedule
from .shrink import shrink

__all__ = [
    "combine",
    "gram",
    "grouped_gemm",
    "grouped_gemm_act",
    "grouped_gemm_act_grad",
    "route",
    "schedule",
    "shrink",
]
