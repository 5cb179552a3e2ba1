"""How long calls take: on a GPU in CUDA graphs, as cli/src/bench/graph.rs and gpu.rs time ours."""
import math
import statistics
import time

import torch

# The numbers of those files: how often the tensors fill the cache, launches and seconds of a graph, repeats.
CACHES, COPIES, LAUNCHES, LONG, REPEATS = 4, 2048, 32, 1e-3, 3


class Gpu:
    """The clock of a CUDA device. Everything is on one stream: a graph takes its backward from where the forward was."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def copies(self, cache, size):
        return min(COPIES, max(1, math.ceil(CACHES * self.cache_bytes / size))) if cache == "cold" else 1

    def events(self):
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def median(self, calls, cache, seconds):
        before, after = self.events()
        for call in calls[:2] + calls[:1]:
            call()
        before.record()
        calls[0]()
        after.record()
        after.synchronize()
        enough = math.ceil(min(LAUNCHES, max(1, LONG / max(before.elapsed_time(after) * 1e-3, 1e-9))))
        launches = math.ceil(enough / len(calls)) * len(calls)
        graph, kept = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph, stream=self.stream):
            for at in range(launches):
                results = calls[at % len(calls)]()
                # Kept results have memory of their own; others have the same again.
                kept += [results] if cache == "cold" else []
        times, end = [], time.monotonic() + seconds
        while len(times) < REPEATS or time.monotonic() < end:
            graph.replay()  # Not counted: keeps the GPU busy until the next is submitted.
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) * 1e3 / launches)
        return statistics.median(times)

    def forget(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def machine(self):
        cudnn = torch.backends.cudnn.version()
        return {"gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda, "cudnn": cudnn}

    def limits(self, seconds):
        a, b = (torch.empty(8192, 8192, device="cuda", dtype=torch.bfloat16).uniform_(-1, 1) for _ in range(2))
        us = self.median([lambda: (a @ b,)], "warm", seconds)
        return [{"case": "matmul 8192 bf16", "kernel": "matmul", "median_us": us, "tflops": 2 * 8192**3 / us / 1e6}]


class Cpu:
    """To try this program without a GPU: no graphs, no cache that is emptied."""

    def copies(self, cache, size):
        return 1

    def median(self, calls, cache, seconds):
        times, end = [], time.monotonic() + seconds
        while len(times) < REPEATS or time.monotonic() < end:
            start = time.perf_counter()
            calls[0]()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    def forget(self):
        pass

    def machine(self):
        return {"gpu": "cpu"}

    def limits(self, seconds):
        return []
