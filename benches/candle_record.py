#!/usr/bin/env python3
"""The medians of candle/benches/cpu.rs as a table.

    for threads in 1 2; do RAYON_NUM_THREADS=$threads cargo bench -p fused-attention-candle --bench cpu; done
    python3 benches/candle_record.py target/criterion candle.csv

A ratio is the peer's time over ours.
"""
import csv
import json
import pathlib
import sys


def medians(folder):
    """Microseconds of every implementation, by case, type and threads."""
    groups = {}
    for path in sorted(pathlib.Path(folder).glob("*/*/new/benchmark.json")):
        benchmark = json.loads(path.read_text())
        case, dtype, threads = benchmark["group_id"].rsplit(" ", 2)
        estimates = json.loads(path.with_name("estimates.json").read_text())
        times = groups.setdefault((case, dtype, int(threads)), {})
        times[benchmark["value_str"]] = estimates["median"]["point_estimate"] / 1e3
    return groups


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[2], "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["peer", "case", "dtype", "threads", "ours_us", "peer_us", "ratio"])
        for (case, dtype, threads), times in sorted(medians(sys.argv[1]).items()):
            ours = times.pop("ours")
            for peer, time in times.items():
                writer.writerow([peer, case, dtype, threads, round(ours), round(time), round(time / ours, 2)])


if __name__ == "__main__":
    main()
