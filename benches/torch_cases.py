"""A case of the bench in PyTorch: its tensors, what is timed, and the formulas that it is held against."""
import math

import torch
import torch.nn.functional as F

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
# Units of rounding that results may be off by, relative to their norm; twice as many backward. A wrong result is off by more.
ROUNDINGS = 8
CHECKED_QUERIES = 64


class Wrong(Exception):
    """A result that is not what the formulas say."""


class Branch:
    def __init__(self, k, v, gate, region, bias):
        self.k, self.v, self.gate, self.region, self.bias = k, v, gate, region, bias


class Tensors:
    """Random tensors of a case, in [batch, seq, heads, head_dim] order as projections leave them."""

    def __init__(self, case, device):
        self.case = case
        dtype, b, h, d, sq = DTYPES[case["dtype"]], case["b"], case["h"], case["d"], case["sq"]

        def uniform(*shape):
            return torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1)

        learned = case["gradients"]
        self.q = uniform(b, sq, h, d).transpose(1, 2)
        self.dout = uniform(b, sq, h * d) if learned else None
        self.branches, self.leaves, segment = [], {"q": self.q}, 0
        for number, shape in enumerate(case["branches"]):
            keys = sum(shape["keys"])
            k, v = (uniform(b, keys, h, d).transpose(1, 2) for _ in range(2))
            gate, region, bias = shape["gate"], None, None
            if f"gate.{number}" in learned:
                gate = torch.tensor(gate, dtype=torch.float32, device=device)
                self.leaves[f"gate.{number}"] = gate
            if shape["region"]:
                region = torch.rand(b, sq, 1, device=device).to(dtype)
            if shape["bias"] == "keys":
                ends = torch.randint(max(1, keys // 2), keys + 1, (b, 1, 1, 1), device=device)
                bias = torch.arange(keys, device=device) < ends
            elif shape["bias"] == "logits":
                bias = uniform(b, 1, sq, keys)
            for at in range(segment, segment + len(shape["keys"])):
                self.leaves[f"k.{at}"], self.leaves[f"v.{at}"] = k, v
            segment += len(shape["keys"])
            self.branches.append(Branch(k, v, gate, region, bias))
        # Segments that are one tensor here have one gradient.
        self.wanted = {id(self.leaves[name]): (name, self.leaves[name]) for name in learned}.values()
        for _, leaf in self.wanted:
            leaf.requires_grad_()

    def bytes(self):
        parts = [self.q, self.q] + [x for b in self.branches for x in (b.k, b.v, b.region, b.bias) if x is not None]
        return sum(x.numel() * x.element_size() for x in parts)


def attend(q, branches):
    out = None
    for branch in branches:
        one = F.scaled_dot_product_attention(q, branch.k, branch.v, attn_mask=branch.bias)
        one = one.transpose(1, 2).flatten(2)
        if branch.region is not None:
            one = one * branch.region
        if isinstance(branch.gate, torch.Tensor) or branch.gate != 1.0:
            one = branch.gate * one
        out = one if out is None else out + one
    return out


def exact(q, branches):
    """The same by the formulas, in the type of q."""
    out = 0
    for branch in branches:
        s = q @ branch.k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if branch.bias is not None:
            s = s.masked_fill(~branch.bias, -math.inf) if branch.bias.dtype == torch.bool else s + branch.bias
        one = (s.softmax(-1) @ branch.v).transpose(1, 2).flatten(2) * branch.gate
        out = out + (one if branch.region is None else one * branch.region)
    return out


def call_of(tensors, fn, dout):
    """What is timed: a function of nothing that returns its results."""
    direction, leaves = tensors.case["direction"], [leaf for _, leaf in tensors.wanted]
    if direction == "forward":
        return lambda: (fn(tensors.q, tensors.branches),)
    if direction == "backward":
        out = fn(tensors.q, tensors.branches)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def step():
        out = fn(tensors.q, tensors.branches)
        return (*torch.autograd.grad(out, leaves, dout), out.detach())

    return step


def check(tensors, fn):
    """Holds results against float64 for the first queries; gradients for a dout that is 0 but for these."""
    case, n = tensors.case, min(CHECKED_QUERIES, tensors.case["sq"])
    wide = {}

    def double(x, rows=None):
        if not isinstance(x, torch.Tensor) or x.dtype == torch.bool:
            return x
        if id(x) not in wide:
            wide[id(x)] = (x if rows is None else x.narrow(rows, 0, n)).detach().double()
            wide[id(x)].requires_grad_(x.requires_grad)
        return wide[id(x)]

    def leading(bias):
        return double(bias, 2) if bias is not None and bias.shape[2] > 1 else double(bias)

    q = double(tensors.q, 2)
    branches = [
        Branch(double(b.k), double(b.v), double(b.gate), double(b.region, 1), leading(b.bias)) for b in tensors.branches
    ]
    if case["direction"] == "forward":
        pairs = [("out", call_of(tensors, fn, None)()[0][:, :n], exact(q, branches))]
    else:
        dout = tensors.dout.clone()
        dout[:, n:] = 0
        out, names = exact(q, branches), [name for name, _ in tensors.wanted]
        want = torch.autograd.grad(out, [wide[id(leaf)] for _, leaf in tensors.wanted], dout[:, :n].double())
        got = call_of(tensors, fn, dout)()
        got = [x[:, :, :n] if name == "q" else x for name, x in zip(names, got)]
        pairs = list(zip(names, got, want))
        if case["direction"] != "backward":
            pairs.append(("out", call_of(tensors, fn, dout)()[-1][:, :n], out.detach()))
    for name, got, want in pairs:
        norm = want.norm().item()
        if name.startswith("gate."):
            # As cli/src/bench/check.rs: by chance such a sum may be small, its error is not.
            keys = sum(case["branches"][int(name[5:])]["keys"])
            norm = max(norm, math.sqrt(case["b"] * n * case["h"] * case["d"] / (9 * keys)))
        off = (got.double() - want).norm().item() / norm
        most = ROUNDINGS * torch.finfo(DTYPES[case["dtype"]]).eps / 2 * (1 if name == "out" else 2)
        if not off <= max(most, 1e-5):
            raise Wrong(f"{name} is off by {off:.1e} of its norm, at most {most:.1e}: not timed")
