"""What the benchmarks of this crate compare with, in PyTorch on the CPU: dilated depthwise convolutions (`conv1d` with
groups), the TCN mixer out of them, MEGA's moving average by `torch.fft` as in the authors' code, and the language models made
of either.

Layers keep their tensors in the order that is fastest here: the TCN `[batch, channels, length]` throughout, with a 1x1
convolution as the map of the channels. Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of
several repetitions after a warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import math
import os
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

THREADS = 2
CHANNELS = 64
KERNEL, FACTOR, BLOCKS = 17, 4, 3
LENGTHS = [4096, 16384, 65536, 131072]


class DilatedConv(nn.Module):
    """Causal and depthwise, `[batch, channels, length]`."""

    def __init__(self, channels, dilation):
        super().__init__()
        self.pad = (KERNEL - 1) * dilation
        self.conv = nn.Conv1d(channels, channels, KERNEL, groups=channels, dilation=dilation)

    def forward(self, x):
        return self.conv(F.pad(x, (self.pad, 0)))


class Tcn(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dw = nn.ModuleList(DilatedConv(channels, FACTOR**b) for b in range(BLOCKS))
        self.pw = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(BLOCKS))

    def forward(self, x):
        for dw, pw in zip(self.dw, self.pw):
            x = x + pw(F.silu(dw(x)))
        return x


class Ema(nn.Module):
    """MEGA's multi-headed EMA, `[batch, channels, length]`."""

    def __init__(self, channels, states=16):
        super().__init__()
        self.delta = nn.Parameter(0.2 * torch.randn(channels, states, 1))
        self.alpha = nn.Parameter(0.2 * torch.randn(channels, states, 1))
        self.beta = nn.Parameter(torch.randn(channels, states, 1))
        self.gamma = nn.Parameter(torch.randn(channels, states))
        self.omega = nn.Parameter(torch.randn(channels))
        self.scale = math.sqrt(1.0 / states)

    def forward(self, x):
        length = x.shape[-1]
        p = torch.sigmoid(self.delta)
        q = 1.0 - p * torch.sigmoid(self.alpha)
        lags = torch.arange(length).view(1, 1, length)
        kernel = (p * self.beta) * torch.exp(lags * torch.log(q))
        kernel = torch.einsum("dnl,dn->dl", kernel, self.gamma * self.scale)
        spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
        return F.silu(y + x * self.omega.unsqueeze(-1))


class Layer(nn.Module):
    """The full variant; attention by PyTorch's fused function."""

    def __init__(self, dim, mixer, chunk=128):
        super().__init__()
        self.z, self.h, self.dim, self.chunk = dim // 2, 2 * dim, dim, chunk
        self.norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = mixer(dim)
        self.v, self.mx = nn.Linear(dim, self.h), nn.Linear(dim, 2 * dim + self.z + self.h)
        self.out = nn.Linear(self.h, dim)
        self.gamma, self.beta = nn.Parameter(torch.randn(2, self.z)), nn.Parameter(torch.zeros(2, self.z))
        self.rot = nn.Parameter(0.02 * torch.randn(2, self.z))
        self.ffn1, self.ffn2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        angles = torch.arange(chunk).unsqueeze(1) * 10000 ** (-torch.arange(self.z // 2) / (self.z // 2))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("hidden", torch.full((chunk, chunk), -torch.inf).triu(1))

    def rotated(self, x):
        a, b = x.chunk(2)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], 1)

    def forward(self, x):
        batch, length, _ = x.shape
        y = self.norm(x)
        v = F.silu(self.v(y))
        m = self.mixer(y.transpose(1, 2)).transpose(1, 2)
        u, z, r, s = self.mx(m).split([self.dim, self.z, self.h, self.dim], -1)
        z = F.silu(z)
        q, k = z * self.gamma[0] + self.beta[0], z * self.gamma[1] + self.beta[1]
        q, k, v = (t.reshape(batch * length // self.chunk, 1, self.chunk, -1) for t in (q, k, v))
        bias = self.rotated(self.rot[0]) @ self.rotated(self.rot[1]).T + self.hidden
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).reshape(batch, length, self.h)
        c = F.silu(s + self.out(a * F.silu(r)))
        x = x + torch.sigmoid(u) * (c - x)
        return x + self.ffn2(F.silu(self.ffn1(self.ffn_norm(x))))


class Lm(nn.Module):
    def __init__(self, dim, layers, mixer):
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.layers = nn.Sequential(*(Layer(dim, mixer) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, ids):
        return self.head(self.norm(self.layers(self.embed(ids))))


def median_milliseconds(work, repetitions):
    work()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def mixer(module, length, both):
    repetitions = min(15, max(3, 2**18 // length))
    x = torch.randn(1, CHANNELS, length, requires_grad=both)
    upstream = torch.randn(1, CHANNELS, length)
    inputs = [x, *module.parameters()]

    def work():
        if both:
            torch.autograd.grad(module(x), inputs, upstream)
        else:
            with torch.no_grad():
                module(x)

    return median_milliseconds(work, repetitions)


def training(kind):
    batch, length = 8, 1024
    model = Lm(128, 4, kind)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def work():
        ids = torch.randint(256, (2, batch, length))
        loss = F.cross_entropy(model(ids[0]).flatten(0, 1), ids[1].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimiser.step()

    return 1e3 * batch * length / median_milliseconds(work, 3)


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    only = os.environ.get("KILN_BENCH_ONLY", "")

    def show(name, unit, measure):
        if only in name:
            print(json.dumps({"name": name, "unit": unit, "value": round(measure(), 4)}), flush=True)

    for both, what in [(False, "fwd"), (True, "fwd+bwd")]:
        for dilation in [1, 16]:
            name = f"dilated conv {what} L=65536 dilation={dilation}"
            show(name, "ms", lambda: mixer(DilatedConv(CHANNELS, dilation), 65536, both))
        for length in LENGTHS:
            show(f"tcn {what} L={length}", "ms", lambda: mixer(Tcn(CHANNELS), length, both))
            show(f"ema {what} L={length}", "ms", lambda: mixer(Ema(CHANNELS), length, both))
    show("training tcnca D=128 L=1024", "tokens/s", lambda: training(Tcn))
    show("training mega D=128 L=1024", "tokens/s", lambda: training(Ema))


if __name__ == "__main__":
    main()
