"""What the benchmarks of this crate compare with: the same workloads in PyTorch on the CPU, with its fused calls.

Prints one JSON object a line, {"name", "unit", "value"}. A time is the median of several repetitions after a
warm-up; memory is how far the resident set of a process that runs only this workload rises above where it was
after the start. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.

Every workload is a function that prepares its operands and returns the work to be measured. Gradients are taken
with a fixed upstream gradient, and no work is asked for that a user would not ask for: weights, inputs of
operators, but not the images, tokens or activations that enter a network. Networks are eager, without dropout.
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
MEMORY_VARIABLE = "KILN_BENCH_MEMORY"


def pull_back(f, *inputs):
    """Forward and backward of `f` at the inputs that require gradients."""
    upstream = torch.randn_like(f(*inputs).detach())
    wanted = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(f(*inputs), wanted, upstream)


def infer(f, *inputs):
    def work():
        with torch.no_grad():
            return f(*inputs)

    return work


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def training_step(model, optimizer, loss):
    """Forward, backward and one step of the optimiser; `loss` gives an output and its upstream gradient."""

    def work():
        optimizer.zero_grad()
        output, upstream = loss(model)
        output.backward(upstream)
        optimizer.step()

    return work


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)


# Operators


def gemm():
    return infer(torch.mm, torch.randn(1024, 1024), torch.randn(1024, 1024))


def products(rows, inner, columns, of_bytes=False):
    if not of_bytes:
        return lambda: infer(torch.mm, torch.randn(rows, inner), torch.randn(inner, columns))
    weights = torch.randint(-127, 128, (inner, columns), dtype=torch.int8)

    def f(x):
        q = (x / 0.03).round_().clamp_(-128, 127).to(torch.int8)
        return torch._int_mm(q, weights).float().mul_(1e-3)

    return lambda: infer(f, torch.randn(rows, inner))


def elementwise(run, f):
    return lambda: run(f, leaf(4096, 1024))


def attention(run):
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return lambda: run(f, *(leaf(2, 8, 2048, 64) for _ in range(3)))


def causal_conv(x, weight, bias):
    return F.conv1d(F.pad(x, (8, 0)), weight, bias, dilation=4)


def conv1d():
    return pull_back(causal_conv, leaf(4, 256, 8192), leaf(256, 256, 3), leaf(256))


def embedding_bag(run):
    """Sums of 32 rows for each of 4096 bags; the gradient of the table is dense."""

    def prepare():
        ids = torch.randint(1_000_000, (4096, 32))
        return run(lambda table: F.embedding_bag(ids, table, mode="sum", sparse=False), leaf(1_000_000, 64))

    return prepare


def layer_norm():
    return pull_back(lambda x, w, b: F.layer_norm(x, (1024,), w, b), leaf(4096, 1024), leaf(1024), leaf(1024))


def rms_norm():
    return pull_back(lambda x, w: F.rms_norm(x, (1024,), w, 1e-5), leaf(4096, 1024), leaf(1024))


def cross_entropy():
    targets = torch.randint(32_000, (512,))
    return pull_back(lambda x: F.cross_entropy(x, targets), leaf(512, 32_000))


def real_fft():
    return pull_back(torch.fft.rfft, leaf(256, 65_536))


def adamw_step():
    """50 million parameters in 150 tensors."""
    parameters = [nn.Parameter(torch.randn(577, 578)) for _ in range(150)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    return optimizer.step


# Networks


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Norms before attention and feed-forward network."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class BertLayer(nn.Module):
    """Norms after attention and feed-forward network, as in BERT-base."""

    def __init__(self, width=768, heads=12, hidden=3072):
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


def encoder_step(layer, width):
    def prepare():
        model, x = layer(), torch.randn(8, 128, width)
        upstream = torch.randn(8, 128, width)
        return training_step(model, adamw(model), lambda model: (model(x), upstream))

    return prepare


def bert_inference():
    return infer(BertLayer().eval(), torch.randn(8, 128, 768))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in [(3, 32), (32, 64), (64, 64)])
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return self.head(x.mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = self.downsample(x) if self.downsample else x
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)).add_(shortcut), inplace=True)


class ResNet18(nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks, inputs = [], 64
        for outputs, stride in [(64, 1), (128, 2), (256, 2), (512, 2)]:
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        return self.fc(self.layers(x).mean((2, 3)))


def classifier_step(network, optimizer, shape, classes):
    def prepare():
        model, x, targets = network(), torch.randn(shape), torch.randint(classes, shape[:1])
        return training_step(model, optimizer(model), lambda model: (F.cross_entropy(model(x), targets), None))

    return prepare


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def resnet_inference():
    return infer(ResNet18().eval(), torch.randn(8, 3, 64, 64))


WORKLOADS = {
    "gemm 1024": gemm,
    "gemm 512": products(512, 512, 512),
    "gemm 128x768x3072": products(128, 768, 3072),
    "gemm 512 of bytes": products(512, 512, 512, of_bytes=True),
    "gemm 128x768x3072 of bytes": products(128, 768, 3072, of_bytes=True),
    "gelu 4096x1024 fwd": elementwise(infer, F.gelu),
    "gelu 4096x1024 fwd+bwd": elementwise(pull_back, F.gelu),
    "softmax 4096x1024 fwd": elementwise(infer, lambda x: F.softmax(x, -1)),
    "softmax 4096x1024 fwd+bwd": elementwise(pull_back, lambda x: F.softmax(x, -1)),
    "layer norm 4096x1024 fwd+bwd": layer_norm,
    "rms norm 4096x1024 fwd+bwd": rms_norm,
    "cross entropy 512x32000 fwd+bwd": cross_entropy,
    "attention causal 2x8x2048x64 fwd": attention(infer),
    "attention causal 2x8x2048x64 fwd+bwd": attention(pull_back),
    "causal conv1d 4x256x8192 fwd+bwd": conv1d,
    "embedding bag 1Mx64 fwd": embedding_bag(infer),
    "embedding bag 1Mx64 fwd+bwd": embedding_bag(pull_back),
    "real fft 256x65536 fwd+bwd": real_fft,
    "adamw step 50M": adamw_step,
    "tiny mlp train": classifier_step(mlp, adamw, (32, 16), 4),
    "cnn train": classifier_step(Cnn, sgd, (16, 3, 32, 32), 10),
    "transformer block train": encoder_step(lambda: TransformerBlock(256, 4, 1024), 256),
    "resnet18 inference": resnet_inference,
    "resnet18 train": classifier_step(ResNet18, sgd, (8, 3, 64, 64), 1000),
    "bert layer inference": bert_inference,
    "bert layer train": encoder_step(BertLayer, 768),
}

# Of these the memory is measured as well.
MEMORY = [
    "attention causal 2x8x2048x64 fwd+bwd",
    "cross entropy 512x32000 fwd+bwd",
    "causal conv1d 4x256x8192 fwd+bwd",
    "real fft 256x65536 fwd+bwd",
    "adamw step 50M",
    "transformer block train",
    "resnet18 train",
    "bert layer train",
]


def median_milliseconds(work, at_least=5, seconds=1.0):
    """The median of at least so many repetitions that together take at least so long, after two more."""
    for _ in range(2):
        work()
    times = []
    while len(times) < at_least or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def resident(field):
    """VmRSS or VmHWM of this process in bytes. (ru_maxrss would begin with what the parent process used.)"""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def peak_bytes(workload):
    """How far memory rises while the operands are made and the work is done three times."""
    # Threads and libraries are there before the count begins.
    training_step(small := mlp(), adamw(small), lambda model: (model(torch.randn(64, 16)).sum(), None))()
    torch.mm(torch.randn(256, 256), torch.randn(256, 256))
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # forgets the highest point so far
    work = workload()
    for _ in range(3):
        work()
    return resident("VmHWM") - before


def peak_mebibytes_of_a_process(name):
    environment = dict(os.environ, **{MEMORY_VARIABLE: name})
    child = subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(child.stdout) / 2**20


def figures():
    for name, workload in WORKLOADS.items():
        yield name, "ms", lambda: median_milliseconds(workload())
    for name in MEMORY:
        yield f"memory of {name}", "MiB", lambda: peak_mebibytes_of_a_process(name)


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if name := os.environ.get(MEMORY_VARIABLE):
        print(peak_bytes(WORKLOADS[name]))
        return
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, unit, measure in figures():
        if only in name:
            print(json.dumps({"name": name, "unit": unit, "value": round(measure(), 4)}), flush=True)


if __name__ == "__main__":
    main()
