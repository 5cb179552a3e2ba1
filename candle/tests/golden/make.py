#!/usr/bin/env python3
"""Writes the golden files of this folder: what diffusers' own IP-Adapter code computes.

To regenerate, with any Python that has torch, diffusers, transformers, numpy and safetensors:

    python candle/tests/golden/make.py

Weights and inputs are not stored: `numbers` makes them from a seed, and candle/tests/common/golden.rs makes the same bits. Stored
are results, in float64 as the oracle and in float32 as the naive computation that the error bound is taken from, and two
small adapters' files in the published format.
"""

import json
import math
import pathlib
import warnings

import numpy
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent
MASK = (1 << 64) - 1


def numbers(seed, *shape, scale=1.0):
    """Uniform numbers from -scale to scale, exact in float32 for a scale that is a power of two (splitmix64)."""
    index = numpy.arange(1, math.prod(shape) + 1, dtype=numpy.uint64)
    with numpy.errstate(over="ignore"):
        z = numpy.uint64(seed * 0xD1342543DE82EF95 & MASK) + index * numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        z ^= z >> numpy.uint64(31)
    unit = (z >> numpy.uint64(40)).astype(numpy.float64) * 2.0**-23 - 1.0
    return torch.from_numpy((unit * scale).astype(numpy.float32).reshape(shape))


def weight(seed, rows, columns):
    """A linear layer that keeps the size of its input, about: its deviation is at least 1 / sqrt(columns)."""
    return numbers(seed, rows, columns, scale=2.0 ** math.ceil(math.log2(math.sqrt(3.0 / columns))))


def layer(seed, hidden, heads, cross):
    """diffusers' attention module, `to_out` the identity: what is stored is what a processor gives to it."""
    attn = Attention(query_dim=hidden, cross_attention_dim=cross, heads=heads, dim_head=hidden // heads)
    fill(attn, seed)
    return attn


def fill(attn, seed):
    hidden, cross = attn.to_q.weight.shape[0], attn.to_k.weight.shape[1]
    with torch.no_grad():
        attn.to_q.weight.copy_(weight(seed, hidden, hidden))
        attn.to_k.weight.copy_(weight(seed + 1, hidden, cross))
        attn.to_v.weight.copy_(weight(seed + 2, hidden, cross))
        attn.to_out[0].weight.copy_(torch.eye(hidden))
        attn.to_out[0].bias.zero_()


def processor(seed, hidden, cross, tokens, scales):
    ip = IPAdapterAttnProcessor2_0(hidden, cross, num_tokens=tuple(tokens), scale=list(scales))
    with torch.no_grad():
        for n in range(len(tokens)):
            ip.to_k_ip[n].weight.copy_(weight(seed + 10 + 2 * n, hidden, cross))
            ip.to_v_ip[n].weight.copy_(weight(seed + 11 + 2 * n, hidden, cross))
    return ip


def naive_linear(x, weight, bias=None):
    """A product that adds one term after the other, in the type of its inputs."""
    out = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    for k in range(weight.shape[1]):
        out += x[..., k, None] * weight[:, k]
    return out if bias is None else out + bias


def both(compute):
    """The result in float64, and that in float32 with naive products of the linear layers."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = compute(torch.float64)
        library, F.linear = F.linear, naive_linear
        naive = compute(torch.float32)
        F.linear = library
        return oracle, naive


def attention_cases():
    """One layer with adapters: name, (hidden, heads, cross), batch, queries, text tokens, adapters as (tokens, images, scale,
    mask), text mask."""
    cases = {
        # A layer of Stable Diffusion 1.5.
        "one-adapter": ((320, 8, 768), 2, 7, 9, [(4, 1, 0.75, False)], False),
        # Two images without masks share a softmax (variant 3 of the two); a negative scale.
        "two-adapters": ((64, 4, 48), 2, 15, 7, [(16, 2, 0.625, False), (4, 1, -0.375, False)], False),
        # Two images with masks have one each (variant 4), and scales of their own; the second adapter has no mask.
        "masks": ((320, 8, 768), 1, 24, 5, [(4, 2, [0.5, 1.25], True), (3, 1, 0.5, True)], False),
        # Masks of ones are not the same as none.
        "masks-one-scale": ((64, 4, 48), 1, 35, 5, [(5, 3, 0.875, True)], False),
        "text-mask": ((48, 3, 40), 2, 10, 11, [(6, 1, 1.5, False)], True),
        # One image of two off, one adapter off.
        "zero-scales": ((48, 3, 40), 1, 20, 6, [(4, 2, [0.0, 0.5], True), (4, 1, 0.0, True)], False),
    }
    stored = {}
    for number, (name, ((hidden, heads, cross), batch, queries, text, adapters, text_mask)) in enumerate(cases.items()):
        seed = 1000 * (number + 1)

        def compute(dtype):
            attn = layer(seed, hidden, heads, cross)
            tokens, scales = [a[0] for a in adapters], [a[2] for a in adapters]
            attn.set_processor(processor(seed, hidden, cross, tokens, scales))
            attn = attn.to(dtype)
            attn.processor.to(dtype)
            x = numbers(seed + 100, batch, queries, hidden).to(dtype)
            states = numbers(seed + 101, batch, text, cross).to(dtype)
            images = [numbers(seed + 110 + n, batch, a[1], a[0], cross).to(dtype) for n, a in enumerate(adapters)]
            masks = None
            if any(a[3] for a in adapters):
                masks = [mask(seed + 120 + n, a[1], 20, 28).to(dtype) for n, a in enumerate(adapters)]
            bias = 2.0 * numbers(seed + 130, batch, 1, text).to(dtype) if text_mask else None
            return attn(
                x, encoder_hidden_states=(states, images), attention_mask=bias, **({"ip_adapter_masks": masks} if masks else {})
            )

        stored[f"{name}.oracle"], stored[f"{name}.naive"] = both(compute)
    save_file(stored, FOLDER / "attention.safetensors")


def mask(seed, images, height, width):
    """Ones and zeros, as diffusers' preprocessing leaves them: [1, images, height, width]."""
    return (numbers(seed, 1, images, height, width) > 0).float()


def checkpoints(unet):
    """A small UNet with the blocks of SD1.5, two adapters in the published format, and what each cross-attention layer computes
    after diffusers has loaded both."""
    cross = unet.config.cross_attention_dim
    names = list(unet.attn_processors)
    adapters = []
    for a, tokens in enumerate([4, 4]):
        ip = {}
        for index, name in enumerate(names):
            if name.endswith("attn2.processor"):
                hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.weight.shape[0]
                ip[f"{index}.to_k_ip.weight"] = weight(50_000 + 1000 * a + index, hidden, cross)
                ip[f"{index}.to_v_ip.weight"] = weight(60_000 + 1000 * a + index, hidden, cross)
        adapters.append({"image_proj": linear_projection(70_000 + a, 20, tokens, cross), "ip_adapter": ip})
    first, second = adapters
    flat = {f"{part}.{key}": tensor for part, tensors in first.items() for key, tensor in tensors.items()}
    save_file(flat, FOLDER / "adapter.safetensors")
    torch.save(second, FOLDER / "adapter.bin")

    stored = {}
    unet._load_ip_adapter_weights(adapters, low_cpu_mem_usage=False)
    for index, name in enumerate(names):
        if not name.endswith("attn2.processor"):
            continue

        def compute(dtype):
            attn = unet.get_submodule(name.removesuffix(".processor"))
            fill(attn, 10_000 + 10 * index)
            attn = attn.to(dtype)
            attn.processor.to(dtype)
            attn.processor.scale = [0.75, -0.5]
            x = numbers(20_000 + index, 1, 3, attn.to_q.weight.shape[0]).to(dtype)
            text = numbers(21_000, 1, 4, cross).to(dtype)
            images = [numbers(22_000 + n, 1, 1, tokens, cross).to(dtype) for n, tokens in enumerate([4, 4])]
            return attn(x, encoder_hidden_states=(text, images))

        stored[f"{name}.oracle"], stored[f"{name}.naive"] = both(compute)
    images = numbers(23_000, 2, 3, 20)
    for n, projection in enumerate(unet.encoder_hid_proj.image_projection_layers):
        oracle, naive = both(lambda dtype: projection.to(dtype)(images.flatten(0, 1).to(dtype)).unflatten(0, (2, 3)))
        stored[f"projection.{n}.oracle"], stored[f"projection.{n}.naive"] = oracle, naive
    save_file(stored, FOLDER / "layers.safetensors")


def linear_projection(seed, embed, tokens, cross):
    return {
        "proj.weight": weight(seed, tokens * cross, embed),
        "proj.bias": numbers(seed + 1, tokens * cross, scale=0.5),
        "norm.weight": 1.0 + numbers(seed + 2, cross, scale=0.25),
        "norm.bias": numbers(seed + 3, cross, scale=0.25),
    }


def norm(seed, width):
    return 1.0 + numbers(seed, width, scale=0.25), numbers(seed + 1, width, scale=0.25)


def resampler(seed, embed, hidden, inner, tokens, cross, depth=4):
    """The keys of an IP-Adapter-Plus, in the order in which golden.rs makes them."""
    keys = {"latents": numbers(seed, 1, tokens, hidden)}
    keys["proj_in.weight"], keys["proj_in.bias"] = weight(seed + 1, hidden, embed), numbers(seed + 2, hidden, scale=0.25)
    keys["proj_out.weight"], keys["proj_out.bias"] = weight(seed + 3, cross, hidden), numbers(seed + 4, cross, scale=0.25)
    keys["norm_out.weight"], keys["norm_out.bias"] = norm(seed + 5, cross)
    for i in range(depth):
        s = seed + 100 * (i + 1)
        for n, (name, width) in enumerate([("0.norm1", hidden), ("0.norm2", hidden), ("1.0", hidden)]):
            keys[f"layers.{i}.{name}.weight"], keys[f"layers.{i}.{name}.bias"] = norm(s + 10 * n, width)
        keys[f"layers.{i}.0.to_q.weight"] = weight(s + 50, inner, hidden)
        keys[f"layers.{i}.0.to_kv.weight"] = weight(s + 51, 2 * inner, hidden)
        keys[f"layers.{i}.0.to_out.weight"] = weight(s + 52, hidden, inner)
        keys[f"layers.{i}.1.1.weight"] = weight(s + 53, 4 * hidden, hidden)
        keys[f"layers.{i}.1.3.weight"] = weight(s + 54, hidden, 4 * hidden)
    return keys


def mlp(seed, embed, hidden, rows, cross, norm_key):
    keys = {
        "proj.0.weight": weight(seed, hidden, embed),
        "proj.0.bias": numbers(seed + 1, hidden, scale=0.25),
        "proj.2.weight": weight(seed + 2, rows, hidden),
        "proj.2.bias": numbers(seed + 3, rows, scale=0.25),
    }
    keys[f"{norm_key}.weight"], keys[f"{norm_key}.bias"] = norm(seed + 4, cross)
    return keys


def projections(unet):
    """Image projections that diffusers builds from a file's keys, and what they make of images."""
    cases = {
        # SD1.5's Plus: 1280 to 768, 12 heads of 64; fewer tokens and patches than the 16 and 257 of the published file.
        "plus": (resampler(80_000, 1280, 768, 768, 3, 768), (1, 2, 5, 1280)),
        "full-face": (mlp(81_000, 40, 40, 24, 24, "proj.3"), (2, 1, 6, 40)),
        "face-id": (mlp(82_000, 32, 64, 4 * 24, 24, "norm"), (2, 3, 32)),
        "linear": (linear_projection(83_000, 40, 4, 24), (2, 3, 40)),
    }
    stored = {}
    for number, (name, (keys, shape)) in enumerate(cases.items()):
        projection = unet._convert_ip_adapter_image_proj_to_diffusers(keys, low_cpu_mem_usage=False)
        images = numbers(84_000 + number, *shape)
        oracle, naive = both(
            lambda dtype: projection.to(dtype)(images.flatten(0, 1).to(dtype)).unflatten(0, shape[:2])
        )
        stored[f"{name}.oracle"], stored[f"{name}.naive"] = oracle, naive
    save_file(stored, FOLDER / "projections.safetensors")


def masks():
    """The four rules. InvokeAI's, ComfyUI's and InstantID's are a few lines around an operation of PyTorch's, which is what is
    taken from it here; diffusers' rule is called."""
    stored = {}
    soft = lambda seed, h, w: numbers(seed, h, w).double() * 0.5 + 0.5
    # Queries that the shape divides and that it does not: padded, cut off.
    for n, (h, w, queries) in enumerate([(20, 28, 35), (64, 64, 256), (30, 17, 100), (9, 40, 384), (7, 5, 12), (16, 16, 400)]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resized = IPAdapterMaskProcessor.downsample(soft(90_000 + n, h, w)[None], 1, queries, 1)
        stored[f"diffusers.{h}x{w}.{queries}"] = resized[0, :, 0]
    for n, (h, w, (lh, lw), queries) in enumerate(
        [(20, 28, (40, 56), 35), (64, 48, (64, 64), 256), (30, 17, (34, 11), 384), (33, 9, (9, 40), 384), (5, 7, (57, 72), 1013)]
    ):
        rows = lh / math.sqrt(lh * lw / queries)
        rows = int(rows) + int(queries % int(rows) != 0)
        resized = F.interpolate(soft(91_000 + n, h, w)[None, None], size=(rows, queries // rows), mode="bilinear").flatten()
        missing = queries - len(resized)
        if missing > 0:
            resized = F.pad(resized, (missing // 2, missing - missing // 2))
        else:
            resized = resized[-missing // 2 :][:queries]
        stored[f"comfyui.{h}x{w}.{lh}x{lw}.{queries}"] = resized
    for n, (h, w, halvings) in enumerate([(16, 20, 0), (64, 48, 2), (33, 47, 1), (33, 47, 3)]):
        pooled = soft(92_000 + n, h, w)[None, None]
        for _ in range(halvings):
            pooled = F.max_pool2d(pooled, kernel_size=2, stride=2, ceil_mode=True)
        stored[f"invokeai.{h}x{w}.{pooled.numel()}"] = pooled.flatten()
    for n, (h, w, queries) in enumerate([(64, 64, 256), (128, 96, 24 * 32), (96, 96, 36), (60, 90, 24)]):
        ratio = (h * w / queries) ** 0.5
        resized = F.interpolate(soft(93_000 + n, h, w)[None, None], scale_factor=1 / ratio, mode="nearest").flatten()
        assert len(resized) == queries, (h, w, queries, len(resized))
        stored[f"instantid.{h}x{w}.{queries}"] = resized
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, FOLDER / "masks.safetensors")


CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def config(kinds, **options):
    down = tuple(kind[0] for kind in kinds)
    return {"down_block_types": down, "up_block_types": tuple(kind[1] for kind in reversed(kinds)), **options}


UNETS = {
    "sd15": config([CROSS, CROSS, CROSS, PLAIN], block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768,
                   attention_head_dim=8),
    "sd21": config([CROSS, CROSS, CROSS, PLAIN], block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024,
                   attention_head_dim=(5, 10, 20, 20)),
    "sdxl": config([PLAIN, CROSS, CROSS], block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
                   attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10)),
}


class Pipeline(IPAdapterMixin):
    unet_name = "unet"

    def __init__(self, unet):
        self.unet = unet


def names_and_scales():
    """Layers of the true UNets, without weights, and the scale that diffusers gives each for InstantStyle's dictionaries."""
    scales = {
        "style": {"up": {"block_0": [0.0, 1.0, 0.0]}},
        "style-and-layout": {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
        "mixed": {"down": {"block_1": 0.5}, "mid": 0.25, "up": {"block_1": [0.125, -0.5, 2.0]}},
    }
    described = {}
    for name, options in UNETS.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**options)
        layers = []
        for path in unet.attn_processors:
            attn = unet.get_submodule(path.removesuffix(".processor"))
            cross = attn.to_k.weight.shape[1] if path.endswith("attn2.processor") else None
            layers.append({"name": path, "hidden": attn.to_q.weight.shape[0], "heads": attn.heads, "cross": cross})
        described[name] = {"layers": layers}
        with torch.device("meta"):
            unet.set_attn_processor(
                {l["name"]: IPAdapterAttnProcessor2_0(l["hidden"], l["cross"] or 1) for l in layers}
            )
        described[name]["scales"] = {}
        for label, scale in scales.items() if name == "sdxl" else []:
            Pipeline(unet).set_ip_adapter_scale(scale)
            processors = unet.attn_processors
            described[name]["scales"][label] = [processors[l["name"]].scale[0] for l in layers if l["cross"]]
    (FOLDER / "unets.json").write_text(json.dumps(described, separators=(",", ":")) + "\n")


small = config([CROSS, CROSS, CROSS, PLAIN], block_out_channels=(8, 16, 16, 24), cross_attention_dim=12, attention_head_dim=2,
               norm_num_groups=4)
attention_cases()
checkpoints(UNet2DConditionModel(**small))
projections(UNet2DConditionModel(**small))
masks()
names_and_scales()
for path in sorted(FOLDER.iterdir()):
    print(f"{path.name:28} {path.stat().st_size:8} bytes")
