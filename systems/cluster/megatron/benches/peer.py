"""What the benchmarks of this crate compare with: the same GPT in PyTorch, on one process or on two joined by gloo.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several steps after a warm-up.
KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

THREADS = 2
STEPS = 9
LAYERS, HIDDEN, HEADS, SEQ, VOCAB = 4, 256, 8, 128, 256


class CopyToRanks(torch.autograd.Function):
    """f: nothing forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class SumOverRanks(torch.autograd.Function):
    """g: all-reduce forward, nothing backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Layer(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.tensor = tensor
        self.heads = HEADS // tensor
        self.ln1, self.ln2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN // tensor)
        self.dense = nn.Linear(HIDDEN // tensor, HIDDEN)
        self.fc1 = nn.Linear(HIDDEN, 4 * HIDDEN // tensor)
        self.fc2 = nn.Linear(4 * HIDDEN // tensor, HIDDEN)

    def copy(self, x):
        return CopyToRanks.apply(x) if self.tensor > 1 else x

    def row(self, layer, x):
        if self.tensor == 1:
            return layer(x)
        return SumOverRanks.apply(F.linear(x, layer.weight)) + layer.bias

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = self.qkv(self.copy(self.ln1(x))).view(b, s, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1)
        x = x + self.row(self.dense, y)
        return x + self.row(self.fc2, F.gelu(self.fc1(self.copy(self.ln2(x))), approximate="tanh"))


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.word, self.position = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(SEQ, HIDDEN)

    def forward(self, ids):
        return self.word(ids) + self.position.weight[: ids.shape[1]]


class Last(nn.Module):
    def __init__(self, word):
        super().__init__()
        self.norm, self.word = nn.LayerNorm(HIDDEN), word

    def forward(self, x):
        return F.linear(self.norm(x), self.word.weight)


def gpt(tensor):
    first = First()
    return nn.Sequential(first, *[Layer(tensor) for _ in range(LAYERS)], Last(first.word))


def stage(rank):
    """Half of the layers; the word embedding is on both stages, as there."""
    layers = [Layer(1) for _ in range(LAYERS // 2)]
    return nn.Sequential(First(), *layers) if rank == 0 else nn.Sequential(*layers, Last(nn.Embedding(VOCAB, HIDDEN)))


def loss_of(logits, targets):
    return F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))


def measure(module, work):
    adam = torch.optim.AdamW(module.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step():
        adam.zero_grad()
        work()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()

    step()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def batch(samples):
    ids = torch.randint(VOCAB, (samples, SEQ + 1))
    return ids[:, :-1], ids[:, 1:]


def single():
    torch.set_num_threads(THREADS)
    (x, y), module = batch(4), gpt(1)
    return measure(module, lambda: loss_of(module(x), y).backward())


def tensor(rank):
    (x, y), module = batch(4), gpt(2)
    return measure(module, lambda: loss_of(module(x), y).backward())


def data(rank):
    (x, y), module = batch(4), nn.parallel.DistributedDataParallel(gpt(1))
    return measure(module, lambda: loss_of(module(x), y).backward())


def pipeline(rank):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    (x, y), module = batch(32), stage(rank)
    example = (x[:4],) if rank == 0 else (torch.zeros(4, SEQ, HIDDEN),)
    part = PipelineStage(module, rank, 2, torch.device("cpu"), input_args=example)
    schedule = Schedule1F1B(part, n_microbatches=8, loss_fn=loss_of)
    word = module[0].word.weight if rank == 0 else module[-1].word.weight

    def work():
        schedule.step(x) if rank == 0 else schedule.step(target=y)
        dist.all_reduce(word.grad)

    return measure(module, work)


def rank_main(rank, port, what, answers):
    torch.set_num_threads(max(1, THREADS // 2))
    torch.manual_seed(0)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    value = what(rank)
    if rank == 0:
        answers.put(value)
    dist.barrier()
    dist.destroy_process_group()


def on_two(what):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank_main, (port, what, answers), nprocs=2)
    return answers.get()


def main():
    torch.manual_seed(0)
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, work in [
        ("one rank, 4 x 128 tokens", single),
        ("t = 2, 4 x 128 tokens", lambda: on_two(tensor)),
        ("p = 2, 8 micro-batches of 4 x 128 tokens", lambda: on_two(pipeline)),
        ("d = 2, 4 x 128 tokens on each", lambda: on_two(data)),
    ]:
        if only in name:
            print(json.dumps({"name": name, "unit": "ms", "value": work()}), flush=True)


if __name__ == "__main__":
    main()
