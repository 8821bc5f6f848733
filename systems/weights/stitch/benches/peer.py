"""What the benchmarks of this crate compare with: a stand-alone vision transformer of the same blocks in plain PyTorch, all
networks of the space as separate models, and switching as the reference implementation does it, by an attribute.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import os
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

THREADS = 2
REPETITIONS = 9
SWITCHES = 100_000
WIDTHS, HEADS, DEPTH, CLASSES, TOKENS = (192, 384), (3, 6), 12, 1000, 37


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(seen)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Stitched(nn.Module):
    """Blocks 0..l of one anchor, a linear layer, blocks m.. of the other; or a whole anchor without a cut."""

    def __init__(self, front, rear, cut=None):
        super().__init__()
        width, last = WIDTHS[front], WIDTHS[rear]
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.zeros(1, TOKENS, width))
        counts = (cut[0] + 1, DEPTH - cut[1]) if cut else (DEPTH, 0)
        blocks = [Block(width, HEADS[front]) for _ in range(counts[0])]
        if cut:
            blocks += [nn.Linear(width, last), *(Block(last, HEADS[rear]) for _ in range(counts[1]))]
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(last, eps=1e-6), nn.Linear(last, CLASSES)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x)[:, 0]))


def median_milliseconds(work):
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def forward(batch):
    net, images = Stitched(0, 1, (5, 6)).eval(), torch.rand(batch, 3, 96, 96)
    with torch.inference_mode():
        return median_milliseconds(lambda: net(images))


def memory():
    pairs = {(l, m) for start in range(DEPTH - 1) for l in (start, start + 1) for m in (start, start + 1) if m > 0}
    with torch.device("meta"):
        nets = [Stitched(0, 0), Stitched(1, 1), *(Stitched(0, 1, cut) for cut in sorted(pairs))]
    assert len(nets) == 34
    return sum(4 * p.numel() for net in nets for p in net.parameters()) / 1e6


def switch():
    net = Stitched(0, 1, (5, 6))

    def work():
        for index in range(SWITCHES):
            net.config = index % 34

    return 1e6 * median_milliseconds(work) / SWITCHES


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, unit, measure in [
        ("stitch of six blocks each of DeiT-Ti and DeiT-S, 96 x 96 pixels, batch 1", "ms", lambda: forward(1)),
        ("stitch of six blocks each of DeiT-Ti and DeiT-S, 96 x 96 pixels, batch 64", "ms", lambda: forward(64)),
        ("memory of the 34 networks, here one and there separate", "MB", memory),
        ("switch to another network", "ns", switch),
    ]:
        if only in name:
            print(json.dumps({"name": name, "unit": unit, "value": round(measure(), 4)}), flush=True)


if __name__ == "__main__":
    main()
