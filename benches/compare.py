#!/usr/bin/env python3
"""One table of our times and PyTorch's, case by case: a CSV, and a summary to read.

    python3 benches/compare.py OURS.json... [--torch TORCH.json] --record FOLDER [--revision REV] [--driver VERSION]

OURS is what `fused-attention bench --json` wrote, the suite `limits` among them; TORCH what benches/torch_baseline.py wrote. The
CSV is FOLDER/<gpu>/<date>_<revision>.csv, its first lines, after a #, the machine and its limits. ratio: the time of PyTorch's
best right way over ours, more than 1 where we are faster; of_limit: the larger of our share of the copy's bandwidth and of
the matrix product's rate. A cell without a time says why, and notes has the reasons.
"""
import argparse
import csv
import datetime
import json
import math
import re
from pathlib import Path

WAYS = ("flash", "cudnn", "efficient", "math", "compiled")
KEY = ("suite", "case", "direction", "dtype", "cache")
SHAPE = ("b", "h", "sq", "skv", "d")


def load(paths):
    """Our rows by key, and the limits."""
    ours, limits = {}, []
    for path in paths:
        for row in json.loads(Path(path).read_text()):
            if row["suite"] == "limits":
                limits.append(row)
            else:
                ours[tuple(row[name] for name in KEY)] = row
    return ours, limits


def cell(row):
    """A time, or the word that stands for the reason why there is none."""
    if row is None:
        return "not run"
    if row["median_us"]:
        return f"{row['median_us']:.3f}"
    return "refused" if row.get("refused") else "failed"


def best(ways):
    timed = {name: row["median_us"] for name, row in ways.items() if row["median_us"]}
    return min(timed.items(), key=lambda pair: pair[1]) if timed else (None, None)


def of_limit(row, limits):
    """The larger share of a limit; None where the limits are not known."""
    copy = [limit["gbytes_per_s"] for limit in limits if limit["case"].startswith("copy")]
    product = [limit["tflops"] for limit in limits if limit["case"].startswith("matmul")]
    if not copy or not product or not row["median_us"]:
        return None
    return max(row["gbytes_per_s"] / copy[0], row["tflops"] / product[0])


def line_of(key, ours, ways, limits):
    """A row of the CSV."""
    shape = ours or next(iter(ways.values()))
    line = dict(zip(KEY, key))
    line |= {name: "+".join(map(str, shape[name])) if name == "skv" else shape[name] for name in SHAPE}
    line |= {"usual": int(shape["usual"]), "kernel": ours["kernel"] if ours else None, "ours_us": cell(ours)}
    line |= {f"{name}_us": cell(ways.get(name)) for name in WAYS}
    line["best"], best_us = best(ways)
    ours_us = ours["median_us"] if ours else None
    # A time without a state of the cache is a processor's.
    comparable = ours_us and best_us and key[KEY.index("cache")]
    line["ratio"] = f"{best_us / ours_us:.3f}" if comparable else None
    if ours_us:
        share = of_limit(ours, limits)
        line |= {"tflops": f"{ours['tflops']:.3f}", "gbytes_per_s": f"{ours['gbytes_per_s']:.1f}"}
        line["of_limit"] = f"{share:.3f}" if share else None
    reasons = [("ours", ours or {}), *ways.items()]
    notes = [f"{name}: {row.get('refused') or row.get('failed')}" for name, row in reasons]
    line["notes"] = " | ".join(note for note in notes if not note.endswith(": None"))
    return line


def summary(lines, heads):
    """The usual cases, a line each, and the geometric mean of the ratios of each suite."""
    yield from heads
    wide = max((len(line["case"]) for line in lines), default=4)
    yield f"{'case':{wide}}  {'direction':13} {'type':4} {'cache':5} {'ours us':>10} {'best':>10} {'us':>10} {'ratio':>7} {'of limit':>8}"
    suite = None
    for line in lines:
        if not line["usual"]:
            continue
        if line["suite"] != suite:
            suite = line["suite"]
            yield f"-- {suite}"
        best_us = line[f"{line['best']}_us"] if line["best"] else "-"
        numbers = (line["ours_us"], line["best"] or "-", best_us, line["ratio"] or "-")
        told = " ".join(f"{text:>{width}}" for text, width in zip(numbers, (10, 10, 10, 7)))
        limit = line.get("of_limit") or "-"
        yield f"{line['case']:{wide}}  {line['direction']:13} {line['dtype']:4} {line['cache'] or '-':5} {told} {limit:>8}"
    yield "-- geometric means of the ratios, all cases"
    groups = {}
    for line in lines:
        if line["ratio"]:
            key = (line["suite"], line["direction"], line["dtype"], line["cache"])
            groups.setdefault(key, []).append(math.log(float(line["ratio"])))
    for key, ratios in groups.items():
        ratio = math.exp(sum(ratios) / len(ratios))
        worst = math.exp(min(ratios))
        yield f"{' '.join(key):{wide + 26}} {ratio:7.2f}  worst {worst:.2f}  of {len(ratios)}"
    if not groups:
        yield "none: no case has both times"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", nargs="+")
    parser.add_argument("--torch", metavar="FILE")
    parser.add_argument("--record", required=True, metavar="FOLDER")
    parser.add_argument("--revision", default="unknown")
    parser.add_argument("--driver", default="unknown")
    parser.add_argument("--gpu", default="unknown", help="where PyTorch does not tell it")
    options = parser.parse_args()

    ours, limits = load(options.ours)
    machine, theirs = {}, {}
    if options.torch and Path(options.torch).exists():
        told = json.loads(Path(options.torch).read_text())
        machine = told["machine"]
        for row in told["rows"]:
            if row["suite"] == "limits":
                limits.append(row)
            else:
                theirs.setdefault(tuple(row[name] for name in KEY), {})[row["kernel"]] = row
    machine = {"gpu": options.gpu, **machine, "driver": options.driver, "revision": options.revision}
    keys = list(dict.fromkeys([*ours, *theirs]))
    suites = list(dict.fromkeys(key[0] for key in keys))
    keys.sort(key=lambda key: (suites.index(key[0]), key[2], key[3], key[4] or ""))
    lines = [line_of(key, ours.get(key), theirs.get(key, {}), limits) for key in keys]

    heads = [f"{name} {value}" for name, value in machine.items()]
    for limit in limits:
        rates = [("gbytes_per_s", "GB/s"), ("tflops", "TFLOP/s")]
        rates = [f", {limit[name]:.0f} {unit}" for name, unit in rates if limit.get(name)]
        heads.append(f"limit: {limit['case']}: {limit['median_us']:.2f} us{''.join(rates)}")
    folder = Path(options.record) / re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = folder / f"{today}_{options.revision[:12]}.csv"
    columns = [*KEY, *SHAPE, "usual", "kernel", "ours_us", *(f"{name}_us" for name in WAYS)]
    columns += ["best", "ratio", "tflops", "gbytes_per_s", "of_limit", "notes"]
    with open(path, "w", newline="") as file:
        file.writelines(f"# {head}\n" for head in heads)
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    print("\n".join(summary(lines, heads)))
    print(f"all of it: {path}")


if __name__ == "__main__":
    main()
