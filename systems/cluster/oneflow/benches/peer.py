"""What the benchmarks of this crate compare with: PyTorch's DTensor on gloo, two processes.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import math
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

RANKS = 2
REPETITIONS = 9
CLASSES, WIDTH, BATCH = 100_000, 128, 64
SCALE, MARGIN = 64.0, 0.5


def median_milliseconds(work):
    seconds = []
    for repetition in range(REPETITIONS + 1):
        dist.barrier()
        start = time.perf_counter()
        work()
        dist.barrier()
        if repetition > 0:
            seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def redistribute(mesh, local_shape, source, target):
    tensor = DTensor.from_local(torch.ones(local_shape), mesh, [source])
    return median_milliseconds(lambda: tensor.redistribute(mesh, [target]).to_local())


class ReduceForward(torch.autograd.Function):
    """All-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, dy):
        return dy


class ReduceBackward(torch.autograd.Function):
    """Identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, dy):
        dy = dy.clone()
        dist.all_reduce(dy)
        return dy


def softmax_head(rank):
    """Classes split over the ranks, written by hand: DTensor has no cross entropy whose margin reads split classes."""
    torch.manual_seed(0)
    part = CLASSES // RANKS
    embed = torch.randn(WIDTH, WIDTH, requires_grad=True)
    head = torch.randn(WIDTH, part, requires_grad=True)
    x = torch.randn(BATCH, WIDTH)
    target = torch.randint(0, CLASSES, (BATCH, 1))
    local = target - rank * part
    here = (local >= 0) & (local < part)
    local = local.clamp(0, part - 1)
    optimiser = torch.optim.SGD([embed, head], lr=0.01, momentum=0.9)

    def step():
        optimiser.zero_grad()
        e = ReduceBackward.apply(F.normalize(x @ embed, dim=1))
        cosine = e @ F.normalize(head, dim=0)
        picked = cosine.gather(1, local)
        sine = (1 - picked.square()).clamp_min(1e-6).sqrt()
        apart = picked * math.cos(MARGIN) - sine * math.sin(MARGIN)
        scores = SCALE * cosine.scatter_add(1, local, torch.where(here, apart - picked, 0.0))
        largest = scores.detach().amax(1, keepdim=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        total = ReduceForward.apply((scores - largest).exp().sum(1, keepdim=True))
        own = ReduceForward.apply(torch.where(here, scores.gather(1, local) - largest, 0.0))
        (total.log() - own).mean().backward()
        optimiser.step()

    return median_milliseconds(step)


def work(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    half, whole = (2048, 4096), (4096, 4096)
    figures = [
        ("4096 x 4096 floats on two ranks, S0 to S1", lambda: redistribute(mesh, half, Shard(0), Shard(1))),
        ("4096 x 4096 floats on two ranks, P to B", lambda: redistribute(mesh, whole, Partial(), Replicate())),
        ("4096 x 4096 floats on two ranks, S0 to B", lambda: redistribute(mesh, half, Shard(0), Replicate())),
        ("training step, 100000 classes split over two ranks", lambda: softmax_head(rank)),
    ]
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, measure in figures:
        if only in name:
            value = measure()
            if rank == 0:
                print(json.dumps({"name": name, "unit": "ms", "value": value}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port,), nprocs=RANKS)
