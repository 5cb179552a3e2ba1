#!/usr/bin/env python3
"""What PyTorch takes for the cases of `fused-attention bench --json`, on the same GPU, timed in the same way.

    python3 benches/torch_baseline.py ROWS.json... --json TORCH.json [--minutes 3]

Each case is computed by every backend of scaled_dot_product_attention alone and, where it has several branches, also by
torch.compile with the backend of PyTorch's own choice. Several branches are what diffusers' IP-Adapter processors do: one
attention each, multiplied by scale and mask, added. Segments of one softmax are concatenated before the clock starts.

Each call is first held against the same formulas in float64, then timed inside a CUDA graph. cold: each launch has tensors
of its own, four times the second-level cache together before one is used again; warm: all have the same. A backend that
refuses, fails or is wrong is a row that says so. benches/compare.py puts these rows beside ours.
"""
import argparse
import contextlib
import json
import os
import sys
import time
import warnings

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    sys.exit(f"LEFT OUT: PyTorch's times: {error}")

from torch_cases import Tensors, Wrong, attend, call_of, check
from torch_clock import Cpu, Gpu

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
COMPILED = "compiled"
# Naive attention with larger logits than this is left out: bytes in f32.
LARGEST_LOGITS = 16 << 30
# What a row says of its case.
FIELDS = ("suite", "case", "usual", "direction", "dtype", "b", "h", "sq", "skv", "d", "flops", "bytes")


def cases_of(paths, on_gpu):
    """Each case once, with the states of the cache that it has rows for; the usual ones first."""
    cases = {}
    for path in paths:
        with open(path) as file:
            rows = [row for row in json.load(file) if "branches" in row]
        for row in rows:
            key = tuple(row[name] for name in ("suite", "case", "direction", "dtype"))
            case = cases.setdefault(key, {**row, "caches": []})
            if row["cache"] not in (*case["caches"], None):
                case["caches"].append(row["cache"])
    for case in cases.values():
        case["caches"] = (case["caches"] or ["cold"]) if on_gpu else [None]
    return list(cases.values())


def in_order(cases, compiled):
    """Pairs of a case and what computes it: the usual cases first, what takes seconds to compile last."""
    ways = [(case, name) for case in cases for name in BACKENDS]
    ways.sort(key=lambda way: not way[0]["usual"])
    decoupled = [case for case in cases if len(case["branches"]) > 1 and case["usual"]]
    return ways + [(case, COMPILED) for case in decoupled if compiled]


def way_of(name):
    """The function, and what makes PyTorch compute it that way."""
    if name != COMPILED:
        return attend, lambda: sdpa_kernel([BACKENDS[name]])
    # Else the compiler, having seen too many shapes, would let later cases run eagerly.
    torch._dynamo.reset()
    return torch.compile(attend, dynamic=False), contextlib.nullcontext


def times(case, fn, context, clock, seconds):
    """Median microseconds by state of the cache, after checking the results."""
    device = "cuda" if isinstance(clock, Gpu) else "cpu"
    medians, sets = {}, [Tensors(case, device)]
    gradients = torch.enable_grad if case["gradients"] else torch.no_grad
    with context(), gradients():
        check(sets[0], fn)
        calls = [call_of(sets[0], fn, sets[0].dout)]
        for cache in sorted(case["caches"], key=lambda cache: cache == "cold"):
            while len(sets) < clock.copies(cache, sets[0].bytes()):
                sets.append(Tensors(case, device))
                calls.append(call_of(sets[-1], fn, sets[-1].dout))
            medians[cache] = clock.median(calls, cache, seconds)
    return medians


def trouble(error, warned):
    """Why there is no time: refused, or failed, with all that PyTorch said."""
    lines = [str(error).split("\n")[0] or type(error).__name__]
    lines += [str(warning.message).split("\n")[0].split(" (Triggered")[0] for warning in warned]
    said = "; ".join(dict.fromkeys(lines))[:400]
    refusal = any(words in str(error) for words in ("No available kernel", "No viable backend"))
    return {"refused" if refusal else "failed": said}


def measure(case, name, clock, seconds):
    """Times by state of the cache, or the reason why there are none."""
    logits = 4 * case["b"] * case["h"] * case["sq"] * max(sum(branch["keys"]) for branch in case["branches"])
    if name == "math" and logits > LARGEST_LOGITS:
        return {"refused": f"left out: its logits would take {logits / 2**30:.0f} GiB"}
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            return {"medians": times(case, *way_of(name), clock, seconds)}
        except (RuntimeError, Wrong, ValueError, TypeError, AttributeError) as error:
            # Wrong beside the others: whatever PyTorch raises in the middle of a case is that case's own.
            return trouble(error, warned)
        finally:
            clock.forget()


def row_of(case, name, cache, outcome):
    row = {key: case[key] for key in FIELDS}
    row |= {"engine": "torch", "kernel": name, "cache": cache, "median_us": None, "tflops": None, "gbytes_per_s": None}
    us = outcome.get("medians", {}).get(cache)
    if us:
        row |= {"median_us": us, "tflops": case["flops"] / us / 1e6, "gbytes_per_s": case["bytes"] / us / 1e3}
    return row | {"refused": outcome.get("refused"), "failed": outcome.get("failed")}


def write(path, machine, rows):
    """Whole or not at all: whoever stops this program keeps what it has measured."""
    with open(path + ".part", "w") as file:
        json.dump({"machine": machine, "rows": rows}, file, indent=1)
    os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="what `fused-attention bench --json` wrote")
    parser.add_argument("--json", required=True, metavar="FILE", help="where the rows go")
    parser.add_argument("--seconds", type=float, default=0.05, help="how long each case runs, three runs at least")
    parser.add_argument("--minutes", type=float, default=60.0, help="what is not begun by then is a row that says so")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try this program")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("LEFT OUT: PyTorch's times: it finds no GPU")

    clock, end = Gpu() if on_gpu else Cpu(), time.monotonic() + 60 * options.minutes
    machine, rows = {"torch": torch.__version__, **clock.machine()}, []
    print("  ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    for limit in clock.limits(options.seconds):
        rows.append({"suite": "limits", "engine": "torch", **limit})
        print(f"limits  {limit['case']}  {limit['tflops']:.0f} TFLOP/s", flush=True)
    written = time.monotonic()
    for case, name in in_order(cases_of(options.rows, on_gpu), not options.no_compile):
        outcome = {"failed": "not begun: out of time"}
        if time.monotonic() < end:
            outcome = measure(case, name, clock, options.seconds)
        for cache in case["caches"]:
            row = row_of(case, name, cache, outcome)
            rows.append(row)
            told = f"{row['median_us']:.2f} us" if row["median_us"] else row["refused"] or row["failed"]
            words = (row["suite"], row["case"], row["direction"], row["dtype"], name, cache or "-", told)
            print("  ".join(words), flush=True)
        if time.monotonic() > written + 2:
            write(options.json, machine, rows)
            written = time.monotonic()
    write(options.json, machine, rows)


if __name__ == "__main__":
    main()
