#!/usr/bin/env python3
"""Writes the golden cases of this folder: attention and its gradients as PyTorch autograd computes them in float64.

To regenerate, with any Python that has torch, numpy and safetensors:

    python tests/golden/make.py

It rewrites every *.safetensors beside it and prints their sizes. Seeds are fixed and headers sorted, so the same
PyTorch writes the same bytes; another may differ in the last bits of the results, which tests/golden.rs allows for.

A file is a case in the command line's file contract: inputs under their names, options in the metadata, `dout` among
the inputs. Results stand beside them as float64 under `expected.`: `expected.out`, `expected.lse.b`
per branch b, `expected.dq` and one gradient for each float input. Inputs are float32, used exactly.

Two definitions are those of the operator, not of PyTorch: a row with no key to attend to contributes 0 and takes no
gradient (PyTorch's softmax gives NaN), and scale and softcap are the nearest float32. Wherever PyTorch has the
operation itself, scaled_dot_product_attention, the formula here is held against it, gradients included.
"""

import json
import pathlib

import numpy
import torch
from safetensors.torch import save
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

FOLDER = pathlib.Path(__file__).parent
INF = float("inf")


def f32(number):
    """The nearest float32, as a Python number."""
    return float(numpy.float32(number))


class Case:
    """Tensors and options under the names of the file contract."""

    def __init__(self, name, q, value_dim=None):
        self.name, self.tensors, self.options = name, {}, {}
        self.random = torch.Generator().manual_seed(len(cases) + 1)
        self.batch, self.seq_q, self.heads, self.head_dim = q
        self.value_dim = value_dim or self.head_dim
        self.tensors["q"] = self.normal(*q)
        self.tensors["dout"] = self.normal(self.batch, self.seq_q, self.heads, self.value_dim)
        cases.append(self)

    def normal(self, *shape, mean=0.0, std=1.0):
        return torch.randn(*shape, generator=self.random) * std + mean

    def segment(self, batch, seq_kv, kv_heads, **inputs):
        """Adds keys and values; further tensors and options by name. The mean of v keeps `out` away from zero."""
        i = sum(name.startswith("k.") for name in self.tensors)
        self.tensors[f"k.{i}"] = self.normal(batch, seq_kv, kv_heads, self.head_dim)
        self.tensors[f"v.{i}"] = self.normal(batch, seq_kv, kv_heads, self.value_dim, mean=0.5)
        for name, value in inputs.items():
            (self.tensors if torch.is_tensor(value) else self.options)[f"{name}.{i}"] = value
        return self

    def branches(self):
        """Segment numbers of each branch."""
        grouped = []
        for i in range(sum(name.startswith("k.") for name in self.tensors)):
            if self.options.get(f"join.{i}") == "true":
                grouped[-1].append(i)
            else:
                grouped.append([i])
        return grouped

    def scale(self):
        return f32(self.options.get("softmax_scale", self.head_dim**-0.5))

    def keep(self, i):
        """[B, H, Sq, Skv]: whether the query may attend to the key."""
        seq_kv = self.tensors[f"k.{i}"].shape[1]
        row, key = torch.arange(self.seq_q)[:, None], torch.arange(seq_kv)
        keep = torch.ones(self.batch, self.heads, self.seq_q, seq_kv, dtype=torch.bool)
        if causal := self.options.get(f"causal.{i}"):
            keep &= causal_keep(causal, self.seq_q, seq_kv)
        if window := self.options.get(f"window.{i}"):
            left, right = (int(reach) for reach in window.split(","))
            centre = row + seq_kv - self.seq_q
            keep &= ((left < 0) | (key >= centre - left)) & ((right < 0) | (key <= centre + right))
        if (key_len := self.tensors.get(f"key_len.{i}")) is not None:
            keep &= key < key_len.to(torch.int64)[:, None, None, None]
        bias = self.tensors.get(f"bias.{i}")
        if bias is not None and bias.dtype == torch.bool:
            keep &= bias
        return keep


def causal_keep(causal, seq_q, seq_kv):
    corner = {"top-left": 0, "bottom-right": seq_kv - seq_q}[causal]
    return torch.ones(seq_q, seq_kv, dtype=torch.bool).tril(corner)


def by_head(case, x, name):
    """A K or V as [B, H, Skv, D]: each of its heads serves as many adjacent query heads."""
    x = x[name].transpose(1, 2).expand(case.batch, -1, -1, -1)
    return x.repeat_interleave(case.heads // x.shape[1], dim=1)


def softmax_by_formula(case, x, segments):
    """P_b V and lse of one branch."""
    logits = []
    for i in segments:
        s = case.scale() * (x["q"].transpose(1, 2) @ by_head(case, x, f"k.{i}").transpose(2, 3))
        if softcap := case.options.get("softcap"):
            s = f32(softcap) * torch.tanh(s / f32(softcap))
        if f"bias.{i}" in x:
            s = s + x[f"bias.{i}"]
        logits.append(torch.where(case.keep(i), s, -INF))
    logits = torch.cat(logits, dim=-1)
    empty = (logits == -INF).all(-1, keepdim=True)
    p = torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, logits), -1))
    v = torch.cat([by_head(case, x, f"v.{i}") for i in segments], dim=2)
    return p @ v, torch.logsumexp(logits.detach(), -1)


def softmax_by_sdpa(case, x, segments):
    """P_b V as PyTorch's own operation computes it."""
    bias = []
    for i in segments:
        keep = case.keep(i)
        bias.append(torch.where(keep, x.get(f"bias.{i}", torch.zeros(())), -INF).double())
    k, v = (torch.cat([by_head(case, x, f"{name}.{i}") for i in segments], dim=2) for name in "kv")
    bias = torch.cat(bias, dim=-1)
    empty = (bias == -INF).all(-1, keepdim=True)
    bias = torch.where(empty, 0.0, bias)
    out = scaled_dot_product_attention(x["q"].transpose(1, 2), k, v, attn_mask=bias, scale=case.scale())
    return torch.where(empty, 0.0, out), None


def compute(case, softmax):
    """`out`, the lse of each branch, and the gradient of every float input, as the file names them."""
    x = {
        name: tensor.double().requires_grad_(name != "dout")
        for name, tensor in case.tensors.items()
        if tensor.dtype == torch.float32
    }
    out, results = 0, {}
    for b, segments in enumerate(case.branches()):
        first = segments[0]
        branch, lse = softmax(case, x, segments)
        if (gate := x.get(f"gate.{first}")) is not None:
            branch = branch * gate.reshape(tuple(gate.shape) + (1,) * (4 - gate.dim()) if gate.dim() else ())
        if (region := x.get(f"region.{first}")) is not None:
            branch = branch * region[:, None, :, None]
        out = out + branch.transpose(1, 2)
        if lse is not None:
            results[f"expected.lse.{b}"] = lse
    wanted = {name: tensor for name, tensor in x.items() if name != "dout"}
    gradients = torch.autograd.grad(out, list(wanted.values()), x["dout"])
    results["expected.out"] = out.detach()
    results.update((f"expected.d{name}", gradient) for name, gradient in zip(wanted, gradients))
    return results


def check_against_sdpa(case, expected):
    """PyTorch has no softcap; all else can be asked of its own operation through its additive mask."""
    if "softcap" in case.options:
        return
    for name, theirs in compute(case, softmax_by_sdpa).items():
        torch.testing.assert_close(expected[name], theirs, rtol=1e-12, atol=1e-12)


def check_corners():
    """The causal rules and the order of grouped heads are what PyTorch means by them."""
    random = torch.Generator().manual_seed(0)
    for seq_q, seq_kv in [(5, 11), (11, 5)]:
        q = torch.randn(1, 6, seq_q, 3, generator=random).double()
        k, v = torch.randn(2, 1, 2, seq_kv, 3, generator=random).double()
        rules = {"top-left": {"is_causal": True}}
        if seq_q <= seq_kv:
            rules["bottom-right"] = {"attn_mask": causal_lower_right(seq_q, seq_kv)}
        for causal, theirs in rules.items():
            keep = causal_keep(causal, seq_q, seq_kv)
            logits = 3**-0.5 * (q @ k.repeat_interleave(3, 1).transpose(2, 3))
            ours = torch.softmax(torch.where(keep, logits, -INF), -1) @ v.repeat_interleave(3, 1)
            theirs = scaled_dot_product_attention(q, k, v, enable_gqa=True, **theirs)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def write(case, expected):
    """The file, its header sorted: safetensors writes metadata in random order."""
    tensors = {name: tensor.contiguous() for name, tensor in {**case.tensors, **expected}.items()}
    for name, tensor in expected.items():
        legal = torch.isfinite(tensor) | (tensor == -INF) if "lse" in name else torch.isfinite(tensor)
        assert legal.all(), f"{case.name}: {name} is not finite"
    file = save(tensors, metadata=case.options)
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(case.options.items()))
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path = FOLDER / f"{case.name}.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + file[end:])
    print(f"{path.name:40} {path.stat().st_size:7} bytes")


# Extents are odd and differ from one another, so that no two can be confused and no row is aligned.
cases = []

Case("plain", (1, 9, 3, 7)).segment(1, 9, 3)

Case("causal-bottom-right-grouped", (1, 5, 9, 7)).segment(1, 11, 3, causal="bottom-right")

# The window is centred on the bottom-right diagonal: 5 to its left is 1 to the left of the top-left diagonal.
Case("causal-top-left-window", (3, 7, 1, 5)).segment(3, 11, 1, causal="top-left", window="5,-1")

case = Case("bias", (3, 7, 5, 9))
over_heads, over_queries = case.normal(3, 1, 7, 11, std=2.0), case.normal(1, 5, 1, 13, std=2.0)
over_heads[1, 0, 2, 4:7] = -INF
case.segment(3, 11, 1, bias=over_heads).segment(3, 13, 1, bias=over_queries)

# All rows of one head, one row of another.
case = Case("bool-mask-empty-rows", (1, 7, 3, 5))
mask = torch.rand(1, 3, 7, 9, generator=case.random) < 0.5
mask[0, 1], mask[0, 2, 3], mask[0, 2, 4] = False, False, True
case.segment(1, 9, 3, bias=mask)

# The corner stays that of the 9 keys of the shape.
key_len = torch.tensor([0, 9, 4, 1, 7], dtype=torch.uint32)
Case("key-len", (5, 3, 1, 7)).segment(5, 9, 1, key_len=key_len, causal="bottom-right")

# The bias is added to what softcap has capped. The window of the first row ends before the first key.
case = Case("softcap-window", (1, 9, 3, 5))
case.options |= {"softcap": "2.7", "softmax_scale": "1.3"}
case.segment(1, 7, 3, window="2,1", bias=case.normal(1, 3, 9, 7))

# Text, and two images that all batch entries share; a gate of 0, negative ones and one above 1.
case = Case("ip-adapter", (3, 7, 5, 9), value_dim=11)
gates = case.normal(3, 5)
gates[0, 1], gates[1, 2], gates[2, 3] = 0.0, -0.75, 3.5
soft, hard = torch.rand(1, 7, generator=case.random), (torch.rand(3, 7, generator=case.random) < 0.5).float()
case.segment(3, 13, 1)
case.segment(1, 3, 5, gate=gates, region=soft)
case.segment(1, 17, 1, gate=torch.tensor(0.3), region=hard)

# Three segments in one softmax, each with its own rule, and a branch after them: its number differs from its segment's.
case = Case("joined", (3, 5, 1, 7), value_dim=9)
case.segment(3, 11, 1, bias=case.normal(1, 1, 5, 11))
case.segment(1, 13, 1, join="true", causal="top-left")
case.segment(3, 1, 1, join="true", bias=case.normal(3, 1, 1, 1))
case.segment(1, 3, 1, gate=case.normal(3), region=case.normal(3, 5))

check_corners()
for case in cases:
    expected = compute(case, softmax_by_formula)
    check_against_sdpa(case, expected)
    write(case, expected)
