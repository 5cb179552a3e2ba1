#!/usr/bin/env python3
"""The cpu engine beside PyTorch's on the same cores, in one run.

    cargo build --release -p fused-attention-cli
    python3 benches/cpu_vs_torch.py target/release/fused-attention [--threads 1,2] [--rounds 3] [--record benches/record/cpu]

For every case and number of threads the command line's `bench --json` and scaled_dot_product_attention take turns, `--rounds`
times; a figure is the median of its rounds' medians, a ratio PyTorch's time over ours. Beside them stands the least of the rounds'
medians, which moves less on a machine that others use too. Both have their tensors in the order that
projections leave them, [batch, seq, heads, head_dim]. Branches are one attention each, multiplied by their scale, added.
PyTorch's results are held against the formulas first (torch_cases.py), ours by the command line.
"""
import argparse
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile

try:
    import torch
except ImportError as error:
    sys.exit(f"LEFT OUT: the comparison with PyTorch: {error}")

from torch_cases import Tensors, attend, call_of, check
from torch_clock import Cpu

# Suite, words of the case's name, types, and the ratio that is aimed at: f32, then f16 and bf16.
CASES = [
    ("sdxl", "1024 self 32x32 b1", ("f32", "f16", "bf16"), (1.1, 1.6)),
    ("sd15", "512 self 32x32 b1", ("f32", "f16", "bf16"), (1.1, 1.6)),
    ("sd15", "512 self 64x64 b1", ("f32", "f16", "bf16"), (1.1, 1.6)),
    ("sdxl", "1024 text 64x64 b1", ("f32", "f16", "bf16"), (1.5, 1.5)),
    ("ip-adapter", "sdxl 4 b2", ("f32",), (2.0, 2.0)),
    ("ip-adapter", "sd15 16 b2", ("f32",), (2.0, 2.0)),
    ("backward", "sdxl self 32x32 b1", ("f32",), (1.1, 1.1)),
]


def ours(program, suite, words, dtype, threads, seconds):
    """The case as the command line tells it, with its time."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.json")
        command = [program, "bench", "--engine", "cpu", "--suite", suite, "--filter", words, "--dtype", dtype]
        command += ["--seconds", str(seconds), "--json", path]
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
        with open(path) as file:
            rows = json.load(file)
    # Words may fit longer names too: "sdxl 4" those of "sdxl 4+16".
    rows = [row for row in rows if row["case"] == words]
    if len(rows) != 1 or rows[0]["median_us"] is None:
        sys.exit(f"{suite} {words}: {len(rows)} rows with this name, or no time")
    return rows[0]


def show(row):
    """A row without what is the same in all of them."""
    print("  ".join(f"{value}" for name, value in row.items() if name not in ("torch", "capability")), flush=True)


def with_backward(rows):
    """The forward and the backward of the same call, added."""
    forward = {(row["dtype"], row["threads"]): row for row in rows if row["case"] == "1024 self 32x32 b1"}
    sums = []
    for row in (row for row in rows if row["direction"] == "backward"):
        first = forward.get((row["dtype"], row["threads"]))
        if first is not None:
            times = {name: first[name] + row[name] for name in row if name.endswith("_us")}
            ratios = {
                "ratio": round(times["torch_us"] / times["ours_us"], 2),
                "least_ratio": round(times["torch_least_us"] / times["ours_least_us"], 2),
            }
            total = {**row, **times, **ratios, "direction": "forward + backward", "ours_gflops": "", "torch_gflops": ""}
            show(total)
            sums.append(total)
    return sums


def record(folder, rows):
    """Adds rows to the day's file, as they come: whoever stops this program keeps what it has measured."""
    if not folder or not rows:
        return
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{datetime.date.today()}_cpu_vs_torch.csv")
    new = not os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="the command line `fused-attention`, built for release")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="numbers of threads, 1 and all unless told")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.2, help="how long each side runs in a round, three runs at least")
    parser.add_argument("--only", default="", help="cases with these words in their names")
    parser.add_argument("--record", metavar="FOLDER", help="writes FOLDER/DATE_cpu_vs_torch.csv; rows of one day are added")
    options = parser.parse_args()

    torch.manual_seed(0)
    clock, rows = Cpu(), []
    print(f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}", flush=True)
    for suite, words, dtypes, (f32_goal, half_goal) in CASES:
        if options.only not in words:
            continue
        for dtype in dtypes:
            for threads in (int(number) for number in options.threads.split(",")):
                torch.set_num_threads(threads)
                mine, theirs, call = [], [], None
                for _ in range(options.rounds):
                    row = ours(options.program, suite, words, dtype, threads, options.seconds)
                    mine.append(row["median_us"])
                    with torch.enable_grad() if row["gradients"] else torch.no_grad():
                        if call is None:
                            tensors = Tensors(row, "cpu")
                            check(tensors, attend)
                            call = call_of(tensors, attend, tensors.dout)
                        call()
                        theirs.append(clock.median([call], None, options.seconds))
                my_least, their_least = min(mine), min(theirs)
                mine, theirs = statistics.median(mine), statistics.median(theirs)
                goal = f32_goal if dtype == "f32" else half_goal
                rows.append({
                    "suite": suite, "case": words, "direction": row["direction"], "dtype": dtype, "threads": threads,
                    "ours_us": round(mine), "torch_us": round(theirs), "ours_gflops": round(row["flops"] / mine / 1e3),
                    "torch_gflops": round(row["flops"] / theirs / 1e3), "ratio": round(theirs / mine, 2), "goal": goal,
                    "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(),
                    "ours_least_us": round(my_least), "torch_least_us": round(their_least),
                    "least_ratio": round(their_least / my_least, 2),
                })
                show(rows[-1])
                record(options.record, rows[-1:])
    sums = with_backward(rows)
    record(options.record, sums)
    rows += sums
    for name in ("ratio", "least_ratio"):
        reached = sum(row[name] >= row["goal"] for row in rows)
        print(f"{name}: {reached} of {len(rows)} reach their goal")


if __name__ == "__main__":
    main()
