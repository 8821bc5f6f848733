"""What the benchmarks of this crate compare with: a chunked hypernetwork in plain PyTorch, all chunks in one call, the same
in hypnettorch, and layers with one set of weights a sample.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. Memory is how far the resident set of a process that does nothing else rises above where it was before the networks
were made. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

THREADS = 2
REPETITIONS = 21
# Set for a process whose memory is measured: the name of its figure.
MEMORY_VARIABLE = "KILN_BENCH_MEMORY"
INPUTS, HIDDEN, CLASSES = 784, 126, 10
WEIGHTS = INPUTS * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES
CHUNK = 1000


class Hypernet(nn.Module):
    """As `hypernet()` in peer.rs."""

    def __init__(self):
        super().__init__()
        self.tasks = nn.Parameter(torch.randn(5, 8))
        self.chunks = nn.Parameter(torch.randn(-(-WEIGHTS // CHUNK), 8))
        self.hidden = nn.Linear(16, 64)
        self.output = nn.Linear(64, CHUNK)

    def forward(self, task):
        code = self.tasks[task].expand(len(self.chunks), -1)
        features = F.relu(self.hidden(torch.cat([self.chunks, code], 1)))
        return self.output(features).flatten()[:WEIGHTS]


def published():
    """hypnettorch's hypernetwork of the same sizes."""
    from hypnettorch.hnets import ChunkedHMLP

    shapes = [[HIDDEN, INPUTS], [HIDDEN], [CLASSES, HIDDEN], [CLASSES]]
    return ChunkedHMLP(
        shapes, CHUNK, chunk_emb_size=8, cond_in_size=8, layers=(64,), num_cond_embs=5, verbose=False
    )


def target(theta, x):
    w1, b1, w2, b2 = theta.split([INPUTS * HIDDEN, HIDDEN, HIDDEN * CLASSES, CLASSES])
    hidden = F.relu(F.linear(x, w1.view(HIDDEN, INPUTS), b1))
    return F.linear(hidden, w2.view(CLASSES, HIDDEN), b2)


def median_milliseconds(work):
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def generate():
    hyper = Hypernet()
    with torch.no_grad():
        return median_milliseconds(lambda: hyper(2))


def generate_published():
    hyper = published()
    with torch.no_grad():
        return median_milliseconds(lambda: hyper.forward(cond_id=2))


def step_published():
    hyper, x, y = published(), torch.randn(64, INPUTS), torch.zeros(64, dtype=torch.long)
    adam = torch.optim.Adam(hyper.parameters(), lr=1e-3)

    def work():
        adam.zero_grad()
        w1, b1, w2, b2 = hyper.forward(cond_id=2)
        logits = F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)
        F.cross_entropy(logits, y).backward()
        adam.step()

    return median_milliseconds(work)


def step():
    hyper, x, y = Hypernet(), torch.randn(64, INPUTS), torch.zeros(64, dtype=torch.long)
    adam = torch.optim.Adam(hyper.parameters(), lr=1e-3)

    def work():
        adam.zero_grad()
        F.cross_entropy(target(hyper(2), x), y).backward()
        adam.step()

    return median_milliseconds(work)


def cached():
    with torch.no_grad():
        theta, x = Hypernet()(2), torch.randn(64, INPUTS)
        return median_milliseconds(lambda: target(theta, x))


def own_convolutions():
    x = torch.randn(64, 8, 28, 28, requires_grad=True)
    w = torch.randn(64, 16, 8, 3, 3, requires_grad=True)

    def work():
        y = F.conv2d(x.reshape(1, 64 * 8, 28, 28), w.reshape(64 * 16, 8, 3, 3), padding=1, groups=64)
        torch.autograd.grad(y.sum(), [x, w])

    return median_milliseconds(work)


def own_linears():
    x = torch.randn(64, 32, 128, requires_grad=True)
    w = torch.randn(64, 128, 128, requires_grad=True)
    return median_milliseconds(lambda: torch.autograd.grad(torch.bmm(x, w).sum(), [x, w]))


FIGURES = {
    f"generate {WEIGHTS} weights in chunks": generate,
    f"training step, {WEIGHTS} weights in chunks": step,
    f"generate {WEIGHTS} weights in chunks, hypnettorch": generate_published,
    f"training step, {WEIGHTS} weights in chunks, hypnettorch": step_published,
    "target forward, weights made before": cached,
    "a convolution of its own for each of 64 images, fwd+bwd": own_convolutions,
    "a linear layer of its own for each of 64 sets, fwd+bwd": own_linears,
}

# Of these the memory is measured as well.
MEMORY = [
    f"training step, {WEIGHTS} weights in chunks",
    f"training step, {WEIGHTS} weights in chunks, hypnettorch",
    "a convolution of its own for each of 64 images, fwd+bwd",
    "a linear layer of its own for each of 64 sets, fwd+bwd",
]


def resident(field):
    """VmRSS or VmHWM of this process in bytes. (ru_maxrss would begin with what the parent process used.)"""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def peak_bytes(measure):
    # Threads and libraries are there before the count begins.
    small = nn.Linear(64, 64)
    adam = torch.optim.Adam(small.parameters(), lr=1e-3)
    F.cross_entropy(small(torch.randn(64, 64)), torch.zeros(64, dtype=torch.long)).backward()
    adam.step()
    try:
        import hypnettorch.hnets  # noqa: F401
    except ImportError:
        pass  # only two of the figures need it
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # forgets the highest point so far
    measure()
    return resident("VmHWM") - before


def peak_mebibytes_of_a_process(name):
    environment = dict(os.environ, **{MEMORY_VARIABLE: name})
    child = subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(child.stdout) / 2**20


def figures():
    for name, measure in FIGURES.items():
        yield name, "ms", measure
    for name in MEMORY:
        yield f"memory of {name}", "MiB", lambda: peak_mebibytes_of_a_process(name)


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if name := os.environ.get(MEMORY_VARIABLE):
        print(peak_bytes(FIGURES[name]))
        return
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, unit, measure in figures():
        if only in name:
            print(json.dumps({"name": name, "unit": unit, "value": round(measure(), 4)}), flush=True)


if __name__ == "__main__":
    main()
