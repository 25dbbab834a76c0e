"""Train a small byte-level language model on real text, then package it, decode with it, and report.

    python examples/train_lm.py                  the Python standard library's source, about four minutes on two cores
    python examples/train_lm.py --text FILE      any other text

Interrupt it (Ctrl-C, SIGTERM) and run it again: it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import asdict
from pathlib import Path

import cores  # noqa: F401 - before PyTorch
import torch
from generation import bits_per_byte, decode_difference, sample_of
from language_model import LanguageModel, ModelConfig
from packaging_prefill import PackageError, operators_of, package_prefill, run_elsewhere
from report import Check, draw_losses, print_table
from text import Text, TextError, baselines, from_file, python_library
from training import CheckpointError, Compilation, Interrupted, Interrupts, Run, TrainingConfig, initialise, train

TOLERANCE = 1e-3  # of logits, whose size is about ten: rounding in float32, taken in different orders

MODEL = {
    "cpu": ModelConfig(),
    "cuda": ModelConfig(width=768, layers=8, heads=6, key_width=64, value_width=128, hidden=1536),
}
TRAINING = {"cpu": TrainingConfig(), "cuda": TrainingConfig(steps=3000, batch=32, time=1024, learning_rate=2e-3)}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="learn from this file (default: Python's standard library)")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where results go (default: out)")
    add("--fresh", action="store_true", help="start over, whatever checkpoint is there")
    add("--init", type=Path, metavar="FILE", help="begin with the weights of a state-dict or checkpoint")
    add("--minutes", type=float, default=2.0, help="train no longer than this (default: 2)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    cpu, gpu = ({**asdict(MODEL[d]), **asdict(TRAINING[d])} for d in ("cpu", "cuda"))
    for name in ("steps", "batch", "time", "learning_rate", "seed", "width", "layers"):
        kind, flag = type(cpu[name]), "--" + name.replace("_", "-")
        add(flag, type=kind, metavar="N", help=f"default: {cpu[name]} on a CPU, {gpu[name]} on a GPU")
    return parser.parse_args()


def new_run(o: argparse.Namespace, text: Text) -> Run:
    """The run that the options describe, continued from its checkpoint if there is one."""
    model_config, config = (
        type(defaults)(**{n: v if getattr(o, n, None) is None else getattr(o, n) for n, v in asdict(defaults).items()})
        for defaults in (MODEL[o.device], TRAINING[o.device])
    )
    if len(text.train) <= config.time:
        raise TextError(f"{text.name}: {len(text.train):,} bytes to train on are less than a window of {config.time:,}")
    torch.manual_seed(config.seed)
    run = Run(LanguageModel(model_config).to(o.device), config, text)
    checkpoint = o.out / "checkpoint.pt"
    if checkpoint.exists() and not o.fresh:
        run.load(checkpoint)
        print(f"continuing from step {run.step} in {checkpoint}")
    elif o.init is not None:
        initialise(run.model, o.init)
        print(f"weights from {o.init}")
    return run


def check_package(model: LanguageModel, text: Text, path: Path) -> Check:
    """Package the prefill for a CPU, and compare its logits in another process with the model's."""
    print(f"exporting and packaging the prefill into {path} ...", flush=True)
    model = copy.deepcopy(model).cpu()
    started = time.monotonic()
    program = package_prefill(model, path)
    seconds = time.monotonic() - started
    tokens = text.held_out[: 3 * 333].view(3, 333).long()
    with torch.no_grad():
        difference = (run_elsewhere(path, tokens) - model(tokens)).abs().max().item()
    return Check(
        "package in a process without fla_ops",
        f"largest difference of logits {difference:.1e} at batch 3, time 333 (exported at 2, 128; "
        f"{', '.join(operators_of(program))} inlined; {seconds:.0f} s)",
        difference <= TOLERANCE,
    )


def check_decoding(model: LanguageModel, text: Text, device: str) -> Check:
    """Compare the in-place decode step with the prefill."""
    tokens = text.held_out[: 2 * 400].view(2, 400).long().to(device)
    difference = decode_difference(model, tokens, prompt=100)
    found = f"largest difference of logits {difference:.1e} over 300 steps after a prompt of 100"
    return Check("decode step against prefill", found, difference <= TOLERANCE)


def check_compilation(found: Compilation | None) -> list[Check]:
    """One graph, no graph break, no recompile."""
    if found is None:
        return []
    graphs = f"{found.graph_breaks} graph breaks, {found.recompiles} recompiles, compiled in {found.seconds:.0f} s"
    return [Check("torch.compile(fullgraph=True)", graphs, found.graph_breaks == found.recompiles == 0)]


def main(o: argparse.Namespace, interrupts: Interrupts) -> int:
    """Train, evaluate, package, decode, report. The exit status: 0 if every check holds."""
    text = python_library() if o.text is None else from_file(o.text)
    o.out.mkdir(parents=True, exist_ok=True)
    run = new_run(o, text)
    size = sum(p.numel() for p in run.model.parameters())
    print(f"text: {text.name}: {len(text.train):,} bytes to train on, {len(text.held_out):,} held out")
    print(f"model: {size / 1e6:.1f} million parameters on {o.device}, {run.config.steps} steps", flush=True)

    compilation = None
    torch.set_float32_matmul_precision("medium")  # products in bfloat16 where the processor has them
    if not run.finished:
        compilation = train(run, o.out / "checkpoint.pt", interrupts, o.minutes)
    run.model.eval()

    print("reading the held-out text: byte counts, xz, the model ...", flush=True)
    reach = baselines(text)
    reach["this model"] = bits_per_byte(run.model, text.held_out)
    torch.set_float32_matmul_precision("highest")
    draw_losses(run.losses, reach, o.out / "loss.png")
    (o.out / "sample.txt").write_text(sample_of(run.model, text))
    checks = check_compilation(compilation)
    checks.append(check_decoding(run.model, text, o.device))
    checks.append(check_package(run.model, text, o.out / "model.pt2"))

    trained = f"{run.step} steps, {run.step * run.config.batch * run.config.time:,} bytes in {run.seconds:.0f} s"
    print_table(trained, reach, checks, o.out)
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(options(), Interrupts()))
    except (TextError, CheckpointError, PackageError) as error:
        sys.exit(f"train_lm: {error}")
    except Interrupted as interrupted:
        print(f"\nstopped by {interrupted}: the same command goes on from here", file=sys.stderr)
        sys.exit(interrupted.exit_status)
