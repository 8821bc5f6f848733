"""What the benchmarks of this crate compare with: the same networks in onnxruntime, tract and PyTorch on the CPU.

Prints one JSON object a line, {"name", "unit", "value"}. A time is the median of several repetitions after a
warm-up; memory is how far the resident set of a process rises that only loads a network and runs it three
times. KILN_BENCH_ONLY=substring runs only the networks whose name contains it.

All run on as many threads as the other side. PyTorch runs the networks eagerly with its fused calls; the others
run what PyTorch's exporter made of them, with the optimisations that they have by default.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

THREADS = 2
MEMORY_VARIABLE = "KILN_BENCH_MEMORY"

NETWORKS = {
    "resnet18 1x3x224x224": ("resnet18", (1, 3, 224, 224)),
    "resnet18 8x3x224x224": ("resnet18", (8, 3, 224, 224)),
    "mobilenet v2 1x3x224x224": ("mobilenet", (1, 3, 224, 224)),
    "mobilenet v2 8x3x224x224": ("mobilenet", (8, 3, 224, 224)),
    "bert-base layers 1x128": ("bert", (1, 128, 768)),
    "bert-base layers 8x128": ("bert", (8, 128, 768)),
    "bert block 8x128x256": ("block", (8, 128, 256)),
    "llama layers 1x256": ("llama", (1, 256, 256)),
    "llama layers 8x256": ("llama", (8, 256, 256)),
    "gla layers 1x256": ("gla", (1, 256, 256)),
    "gla layers 8x256": ("gla", (8, 256, 256)),
}


def network(kind):
    """The network in PyTorch; imported here, so that processes whose memory is measured need not load it."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Conv(nn.Sequential):
        def __init__(self, inputs, outputs, kernel, stride=1, groups=1):
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
            super().__init__(conv, nn.BatchNorm2d(outputs))

    class BasicBlock(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1, self.conv2 = Conv(inputs, outputs, 3, stride), Conv(outputs, outputs, 3)
            self.shortcut = Conv(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

        def forward(self, x):
            return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))

    class Head(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.fc = nn.Linear(inputs, 1000)

        def forward(self, x):
            return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def resnet18():
        blocks, inputs = [], 64
        for outputs, stride in [(64, 1), (128, 2), (256, 2), (512, 2)]:
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        return nn.Sequential(Conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks, Head(512))

    class Inverted(nn.Module):
        def __init__(self, inputs, outputs, expansion, stride):
            super().__init__()
            hidden = inputs * expansion
            layers = [Conv(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
            layers += [Conv(hidden, hidden, 3, stride, hidden), nn.ReLU6(), Conv(hidden, outputs, 1)]
            self.layers, self.residual = nn.Sequential(*layers), stride == 1 and inputs == outputs

        def forward(self, x):
            return x + self.layers(x) if self.residual else self.layers(x)

    def mobilenet():
        layers, inputs = [Conv(3, 32, 3, 2), nn.ReLU6()], 32
        for expansion, outputs, repeats, first in [
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ]:  # fmt: skip
            for repeat in range(repeats):
                layers.append(Inverted(inputs, outputs, expansion, first if repeat == 0 else 1))
                inputs = outputs
        return nn.Sequential(*layers, Conv(320, 1280, 1), nn.ReLU6(), Head(1280))

    class Attention(nn.Module):
        def __init__(self, width, heads, causal):
            super().__init__()
            self.heads, self.causal = heads, causal
            self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            return self.out(mixed.transpose(1, 2).flatten(2))

    class BertLayer(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.attention = Attention(width, heads, False)
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))

    class LlamaLayer(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.attention = Attention(width, heads, True)
            self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
            self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
            self.down = nn.Linear(2 * width, width)

        def forward(self, x):
            x = x + self.attention(self.norm1(x))
            normed = self.norm2(x)
            return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    class GatedAttention(nn.Module):
        """Gated linear attention by chunks of 64 steps, with blocks of 16 on the diagonal."""

        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.q, self.k = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
            self.v, self.gate, self.out = (nn.Linear(width, width) for _ in range(3))
            self.gates = nn.Sequential(nn.Linear(width, 16), nn.Linear(16, width // 2))
            self.norm = nn.RMSNorm(width // heads, eps=1e-6)
            future = torch.full((16, 16), float("-inf")).triu(1).unsqueeze(-1)
            self.register_buffer("future", future)

        def forward(self, x):
            def split(y):
                return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

            g = split(F.logsigmoid(self.gates(x)) / 16.0)
            mixed = self.by_chunks(split(self.q(x)), split(self.k(x)), split(self.v(x)), g)
            return self.out(self.norm(mixed).transpose(1, 2).flatten(2) * F.silu(self.gate(x)))

        def by_chunks(self, q, k, v, g):
            batch, heads, time, key = q.shape
            q, k, v, g = (y.reshape(batch * heads, time // 64, 64, -1) for y in (q * key**-0.5, k, v, g))
            b = g.cumsum(2)
            total = b[:, :, -1:]
            written, decay = (k * (total - b).exp()).transpose(-1, -2) @ v, total.exp().transpose(-1, -2)
            state, before = torch.zeros_like(written[:, 0]), []
            for chunk in range(time // 64):
                before.append(state)
                state = decay[:, chunk] * state + written[:, chunk]
            carried = (q * b.exp()) @ torch.stack(before, 1)

            qd, kd, bd, vd = (y.unflatten(2, (4, 16)) for y in (q, k, b, v))
            exponent = bd.unsqueeze(4) - bd.unsqueeze(3) + self.future
            inside = ((qd.unsqueeze(4) * exponent.exp() * kd.unsqueeze(3)).sum(-1) @ vd).flatten(2, 3)
            parts = [inside[:, :, :16]]
            for start in (16, 32, 48):
                block, reference = slice(start, start + 16), b[:, :, start : start + 1]
                queries = q[:, :, block] * (b[:, :, block] - reference).exp()
                keys = k[:, :, :start] * (reference - b[:, :, :start]).exp()
                parts.append(inside[:, :, block] + (queries @ keys.transpose(-1, -2)) @ v[:, :, :start])
            return (carried + torch.cat(parts, 2)).reshape(batch, heads, time, -1)

    class GlaLayer(LlamaLayer):
        def __init__(self, width, heads):
            super().__init__(width, heads)
            self.attention = GatedAttention(width, heads)

    torch.manual_seed(0)
    made = {
        "resnet18": resnet18,
        "mobilenet": mobilenet,
        "bert": lambda: nn.Sequential(*(BertLayer(768, 12) for _ in range(12))),
        "block": lambda: BertLayer(256, 4),
        "llama": lambda: nn.Sequential(*(LlamaLayer(256, 4) for _ in range(4))),
        "gla": lambda: nn.Sequential(*(GlaLayer(256, 4) for _ in range(4))),
    }[kind]()
    return made.eval()


def exported(name, folder):
    """The network as an ONNX file."""
    import torch

    kind, shape = NETWORKS[name]
    path = os.path.join(folder, "model.onnx")
    torch.onnx.export(network(kind), (torch.randn(shape),), path, input_names=["x"], external_data=False, verbose=False)
    return path


def onnxruntime_session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_onnxruntime(path, x):
    session = onnxruntime_session(path)
    return lambda: session.run(None, {"x": x})


def run_tract(path, x):
    """tract has no threads of its own here."""
    import tract

    model = tract.onnx().load(path).into_model().into_runnable()
    return lambda: model.run([x])


def run_torch(name, x):
    import torch

    torch.set_num_threads(THREADS)
    model, x = network(NETWORKS[name][0]), torch.from_numpy(x)

    def work():
        with torch.inference_mode():
            model(x)

    return work


def median_milliseconds(work, at_least=7, seconds=1.0):
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


def peak_bytes(path, shape):
    """How far memory rises while onnxruntime loads the network and runs it three times."""
    import onnxruntime  # noqa: F401 (loaded before the count begins)

    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # forgets the highest point so far
    work = run_onnxruntime(path, np.ones(shape, np.float32))
    for _ in range(3):
        work()
    return resident("VmHWM") - before


def show(name, unit, value):
    print(json.dumps({"name": name, "unit": unit, "value": round(value, 4)}), flush=True)


def main():
    if path := os.environ.get(MEMORY_VARIABLE):
        print(peak_bytes(path, json.loads(os.environ["KILN_BENCH_SHAPE"])))
        return
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, (_, shape) in NETWORKS.items():
        if only not in name:
            continue
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = exported(name, folder)
            show(f"{name}, beside onnxruntime", "ms", median_milliseconds(run_onnxruntime(path, x)))
            show(f"{name}, beside tract", "ms", median_milliseconds(run_tract(path, x), at_least=3))
            environment = dict(os.environ, **{MEMORY_VARIABLE: path, "KILN_BENCH_SHAPE": json.dumps(shape)})
            child = subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE)
            show(f"memory of {name}, beside onnxruntime", "MiB", int(child.stdout) / 2**20)
        show(f"{name}, beside PyTorch", "ms", median_milliseconds(run_torch(name, x)))


if __name__ == "__main__":
    main()
