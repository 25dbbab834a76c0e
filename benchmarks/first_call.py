"""Times the first calls of one operator in a process of its own: `python -m benchmarks.first_call OPERATOR DEVICE`."""

from __future__ import annotations

import json
import sys
import time

start = time.perf_counter()

import torch  # noqa: E402

torch_imported = time.perf_counter()

import fla_ops  # noqa: E402, F401

imported = time.perf_counter()


def main(operator: str, device_type: str) -> None:
    """Print the seconds of the imports, and of the first and second call, forward and forward+backward."""
    from .contenders import EAGER, input_sets, ours
    from .problems import problems
    from .timing import synchronise

    device = torch.device(device_type)
    problem = next(p for p in problems(device, quick=True) if p.operator == operator)
    times = {"import_torch_s": torch_imported - start, "import_s": imported - torch_imported}
    for what in problem.passes:
        call = ours(problem, what, EAGER, input_sets(problem, what, device, 0)).call
        for which in ("first", "second"):
            synchronise(device)
            begin = time.perf_counter()
            call(0)
            synchronise(device)
            times[f"{which}_{what}_s"] = time.perf_counter() - begin
    print(json.dumps(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
