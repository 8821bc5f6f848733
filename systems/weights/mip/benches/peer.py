"""What the benchmarks of this crate compare with: the same hypernetwork in plain PyTorch with `torch.func.functional_call`, and
in hyperlight, the authors' library.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. Memory is how far the resident set of a process that does nothing else rises above where it was before the networks
were made. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

THREADS = 2
REPETITIONS = 9
# Set for a process whose memory is measured: the name of its figure.
MEMORY_VARIABLE = "KILN_BENCH_MEMORY"


class Lenet(nn.Module):
    """As `Arch::Lenet`."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5, padding=2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.leaky_relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.leaky_relu(self.conv2(x)), 2)
        return self.fc3(F.leaky_relu(self.fc2(F.leaky_relu(self.fc1(x.flatten(1))))))


class Mip(nn.Module):
    """All weights of a network from one number: theta_0 + h(cos, sin)."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.shapes = {name: p.shape for name, p in network.named_parameters()}
        self.hidden = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 64), nn.Linear(64, 128)])
        self.output = nn.Linear(128, sum(s.numel() for s in self.shapes.values()), bias=False)

    def forward(self, gamma):
        a = torch.cat([torch.cos(math.pi / 2 * gamma), torch.sin(math.pi / 2 * gamma)])
        for layer in self.hidden:
            a = F.leaky_relu(layer(a))
        parts = self.output(a).split([s.numel() for s in self.shapes.values()])
        own = dict(self.network.named_parameters())
        return {name: own[name] + part.view(s) for part, (name, s) in zip(parts, self.shapes.items())}


def median_milliseconds(work):
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def step():
    model, x, y = Mip(Lenet()), torch.rand(64, 1, 28, 28), torch.zeros(64, dtype=torch.long)
    adam, gamma = torch.optim.Adam(model.parameters(), lr=3e-4), torch.tensor([0.3])

    def work():
        adam.zero_grad()
        F.cross_entropy(functional_call(model.network, model(gamma), (x,)), y).backward()
        adam.step()

    return median_milliseconds(work)


def million():
    layers = [nn.Linear(784, 1000), nn.Linear(1000, 200), nn.Linear(200, 10)]
    model, gamma = Mip(nn.Sequential(*layers)), torch.tensor([0.3])
    with torch.no_grad():
        return median_milliseconds(lambda: model(gamma))


def step_published():
    import hyperlight as hl

    network = Lenet()
    network = hl.hypernetize(network, modules=hl.find_modules_of_type(network, [nn.Conv2d, nn.Linear]))
    hyper = hl.HyperNet(
        input_shapes={"gamma": (1,)}, output_shapes=network.external_shapes(), hidden_sizes=[16, 64, 128]
    )
    x, y = torch.rand(64, 1, 28, 28), torch.zeros(64, dtype=torch.long)
    adam, gamma = torch.optim.Adam(hyper.parameters(), lr=3e-4), torch.tensor([0.3])

    def work():
        adam.zero_grad()
        with network.using_externals(hyper(gamma=gamma)):
            loss = F.cross_entropy(network(x), y)
        loss.backward()
        adam.step()

    return median_milliseconds(work)


FIGURES = {
    "training step, LeNet, 64 images": step,
    "training step, LeNet, 64 images, hyperlight": step_published,
    "a network of 987210 weights for one condition": million,
}

# Of these the memory is measured as well.
MEMORY = ["training step, LeNet, 64 images", "training step, LeNet, 64 images, hyperlight"]


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
        import hyperlight  # noqa: F401
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
