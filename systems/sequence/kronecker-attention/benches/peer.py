"""What the benchmarks of this crate compare with: attention over pairs of tokens in plain PyTorch, as one einsum with the
weights of all pairs in memory, and block by block.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import os
import statistics
import time

import torch
from torch.utils.checkpoint import checkpoint

THREADS = 2
WIDTH = 32
QUERIES = 16  # queries of a block


def direct(q, k1, k2, v1, v2):
    """All pairs at once: n³ weights."""
    scores = torch.einsum("ic,jc,kc->ijk", q, k1, k2) / WIDTH
    weights = scores.flatten(1).softmax(1).unflatten(1, (len(k1), len(k2)))
    return (torch.einsum("ijk,kc->ijc", weights, v2) * v1).sum(1)


def blockwise(q, k1, k2, v1, v2):
    """Some queries at a time; the backward pass computes their weights again."""
    blocks = q.split(QUERIES)
    if not q.requires_grad:
        return torch.cat([direct(block, k1, k2, v1, v2) for block in blocks])
    return torch.cat([checkpoint(direct, block, k1, k2, v1, v2, use_reentrant=False) for block in blocks])


def operands(n, gradients):
    return [torch.randn(n, WIDTH, requires_grad=gradients) for _ in range(5)]


def median_milliseconds(work, repetitions):
    work()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def forward(form, n, repetitions):
    inputs = operands(n, False)
    return median_milliseconds(lambda: form(*inputs), repetitions)


def forward_backward(form, n, repetitions):
    inputs = operands(n, True)
    upstream = torch.randn(n, WIDTH)
    return median_milliseconds(lambda: torch.autograd.grad(form(*inputs), inputs, upstream), repetitions)


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    inputs = operands(40, False)
    assert torch.allclose(direct(*inputs), blockwise(*inputs), atol=1e-5)
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for n, repetitions in [(64, 15), (128, 9), (256, 5), (512, 3)]:
        # The faster of the two forms that memory allows is the one to beat.
        form = direct if n <= 256 else blockwise
        for name, measure in [("fwd", forward), ("fwd+bwd", forward_backward)]:
            name = f"pairs {name} n={n}"
            if only in name:
                value = measure(form, n, repetitions)
                if form is direct:
                    value = min(value, measure(blockwise, n, repetitions))
                print(json.dumps({"name": name, "unit": "ms", "value": round(value, 4)}), flush=True)


if __name__ == "__main__":
    main()
