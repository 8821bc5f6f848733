"""What the benchmarks of this crate compare with: fast-tsp, torch-pruning, and the reference's generation in PyTorch.

Prints one JSON object a line, {"name", "unit", "value"}; every time is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import math
import os
import statistics
import time

import fast_tsp
import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning
from torch import nn
from torch.func import functional_call

THREADS = 2
REPETITIONS = 9
# What fast-tsp may take for a path; Kiln's own time is a figure of its own.
SECONDS = {96: 0.1, 512: 1.0}


class Lenet(nn.Module):
    """As Kiln's `lenet`."""

    def __init__(self, width=32):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 5, padding=2)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 5, padding=2)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.conv1(x)), 2)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(F.relu(self.conv3(x)).mean((2, 3)))


class ResMlp(nn.Module):
    """The implicit function of one tensor."""

    def __init__(self, inputs, hidden=256, layers=4, taps=25):
        super().__init__()
        self.input = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers - 1)])
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(0.1)) for _ in range(layers - 1)])
        self.output = nn.Linear(hidden, taps)

    def forward(self, x):
        h = F.relu(self.input(x))
        for block, scale in zip(self.blocks, self.scales):
            h = h + scale * F.relu(block(h))
        return self.output(h)


class Family(nn.Module):
    """Coordinates with noise on all six, encoding, one perceptron a tensor, and the crop of each kernel."""

    def __init__(self, network, frequencies=16, norm=32.0):
        super().__init__()
        self.shapes = {name: p.shape for name, p in network.named_parameters()}
        self.norm = norm
        self.register_buffer("bands", 2.0 ** torch.arange(frequencies) * math.pi)
        self.mlps = nn.ModuleList([ResMlp(6 + 12 * frequencies) for _ in self.shapes])

    def coords(self, index, shape):
        outputs, inputs = shape[0], shape[1] if len(shape) > 1 else 1
        o, c = torch.meshgrid(torch.arange(outputs), torch.arange(inputs), indexing="ij")
        rest = torch.tensor([len(self.shapes), outputs, inputs]).expand(outputs * inputs, 3)
        return torch.cat([torch.full((outputs * inputs, 1), index), o.reshape(-1, 1), c.reshape(-1, 1), rest], 1).float()

    def forward(self):
        made = {}
        for index, (name, shape) in enumerate(self.shapes.items()):
            v = self.coords(index, shape)
            v = v + torch.rand_like(v) - 0.5
            u = v / self.norm
            u = torch.cat([u[:, :3] / u[:, 3:], u[:, 3:]], 1)
            turns = (u.unsqueeze(1) * self.bands.view(1, -1, 1)).unsqueeze(-1)
            encoded = torch.cat([u, torch.cat([turns.sin(), turns.cos()], -1).flatten(1)], 1)
            raw = self.mlps[index](encoded) / v[:, 5:]
            taps = math.prod(shape[2:]) if len(shape) > 2 else 1
            start = 25 // 2 - taps // 2 if len(shape) > 2 else 0
            made[name] = raw[:, start : start + taps].reshape(shape)
        return made


def median_milliseconds(work):
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def cities(count):
    """Points that Kiln's side draws too: a linear congruential generator, eight numbers a city."""
    state, values = 1, []
    for _ in range(8 * count):
        state = (1664525 * state + 1013904223) % 2**32
        values.append(state / 2**32)
    return np.array(values, dtype=np.float32).reshape(count, 8)


def path_length(count):
    points = cities(count)
    distances = np.abs(points[:, None] - points[None]).sum(-1)
    # Whole numbers, and one city more that is at distance 0 from all.
    table = np.zeros((count + 1, count + 1), dtype=int)
    table[:count, :count] = np.rint(1e4 * distances)
    tour = fast_tsp.find_tour(table.tolist(), SECONDS[count])
    cut = tour.index(count)
    path = tour[cut + 1 :] + tour[:cut]
    return float(sum(distances[a, b] for a, b in zip(path, path[1:])))


def prune():
    x = torch.zeros(1, 1, 28, 28)

    def work():
        network = Lenet()
        pruner = torch_pruning.pruner.MagnitudePruner(
            network,
            x,
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=[network.fc],
        )
        pruner.step()

    return median_milliseconds(work)


def generate():
    family = Family(Lenet())
    with torch.no_grad():
        return median_milliseconds(family)


def step():
    network, x, y = Lenet(), torch.rand(64, 1, 28, 28), torch.zeros(64, dtype=torch.long)
    family = Family(network)
    adam = torch.optim.AdamW(family.parameters(), lr=1e-3)

    def work():
        adam.zero_grad()
        made = family()
        loss = F.cross_entropy(functional_call(network, made, (x,)), y)
        (loss + 1e-4 * sum(w.norm() for w in made.values())).backward()
        adam.step()

    return median_milliseconds(work)


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, unit, measure in [
        ("path through 96 cities", "length", lambda: path_length(96)),
        ("time for the path through 96 cities", "ms", lambda: 1e3 * SECONDS[96]),
        ("path through 512 cities", "length", lambda: path_length(512)),
        ("time for the path through 512 cities", "ms", lambda: 1e3 * SECONDS[512]),
        ("pruning lenet to half of its channels by L1", "ms", prune),
        ("weights of lenet, width 32", "ms", generate),
        ("training step of a family of lenet, 64 pictures", "ms", step),
    ]:
        if only in name:
            print(json.dumps({"name": name, "unit": unit, "value": round(measure(), 4)}), flush=True)


if __name__ == "__main__":
    main()
