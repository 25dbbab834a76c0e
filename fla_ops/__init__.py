from fla_ops import registrations as registrations  # registers every operator
from fla_ops.registrations._inline import inlining
from fla_ops.registrations._op import OPERATORS, Operator
from fla_ops.simple_gla.api import (
    chunk_simple_gla,
    fused_chunk_simple_gla,
    fused_recurrent_simple_gla,
    parallel_simple_gla,
    simple_gla,
    simple_gla_step_,
)

from .dispatch import explain


def ops():
    return dict(OPERATORS)
