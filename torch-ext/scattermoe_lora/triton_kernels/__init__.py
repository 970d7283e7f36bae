"""The GPU backend: eight kernel families in Triton, names, arguments and results as in `reference`'s second half.

Every ``tl.dot`` asks for ``ieee``: float32 operands then multiply as float32 (TF32 has 3e-4 of relative error), and
16-bit ones, which have one precision, compile for every GPU (gfx950 refuses ``tf32`` even for them).
"""

from .act import act_grad, act_grad_grams, activated, activated_grad
from .cast import cast, dense, in_factors
from .combine import combine
from .device import tile_rows
from .dropout import dropout
from .gram import gram, shrink_gram
from .grouped_gemm import grouped_gemm, grouped_gemm_act
from .launch import columns, empty, empty_like
from .replay import replay
from .route import route, schedule
from .shrink import shrink

__all__ = [
    "act_grad",
    "act_grad_grams",
    "activated",
    "activated_grad",
    "cast",
    "columns",
    "combine",
    "dense",
    "dropout",
    "empty",
    "empty_like",
    "gram",
    "grouped_gemm",
    "grouped_gemm_act",
    "in_factors",
    "replay",
    "route",
    "schedule",
    "shrink",
    "shrink_gram",
    "tile_rows",
]
