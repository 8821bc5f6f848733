"""What the benchmarks of this crate compare with: all-reduces by torch.distributed with gloo, and by Open MPI.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median over many calls of the slowest
rank's time. Open MPI's figures beside Kiln's threads are those of its shared memory, beside Kiln's TCP those of its TCP.
KILN_BENCH_ONLY=substring prints only the figures whose name contains it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np

SIZES = [("1 KiB", 1 << 10), ("1 MiB", 1 << 20), ("64 MiB", 64 << 20)]
BUDGET = 0.3


def measure(barrier, reduce, largest, first):
    """Median over calls of the time of the slowest rank; `largest` reduces to the maximum, `first` is rank 0's value."""

    def once():
        barrier()
        start = time.perf_counter()
        reduce()
        return time.perf_counter() - start

    once()
    repeats = first(min(max(int(BUDGET / once()), 5), 2000))
    return float(np.median(largest(np.array([once() for _ in range(repeats)]))))


def gloo_rank(rank, ranks, port, answers):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)

    def largest(times):
        times = torch.from_numpy(times)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return times.numpy()

    def first(number):
        number = torch.tensor([number])
        dist.broadcast(number, 0)
        return int(number)

    seconds = []
    for _, size in SIZES:
        buffer = torch.zeros(size // 4)
        seconds.append(measure(dist.barrier, lambda: dist.all_reduce(buffer), largest, first))
    if rank == 0:
        answers.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


def gloo(ranks):
    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(gloo_rank, (ranks, port, answers), nprocs=ranks)
    return answers.get()


def mpi_rank():
    from mpi4py import MPI

    world = MPI.COMM_WORLD

    def largest(times):
        into = np.empty_like(times)
        world.Allreduce(times, into, MPI.MAX)
        return into

    seconds = []
    for _, size in SIZES:
        buffer = np.zeros(size // 4, np.float32)
        reduce = lambda: world.Allreduce(MPI.IN_PLACE, buffer, MPI.SUM)
        seconds.append(measure(world.Barrier, reduce, largest, world.bcast))
    if world.rank == 0:
        print(json.dumps(seconds))


def open_mpi(ranks, btl):
    environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    command = ["mpirun", "--oversubscribe", "--mca", "btl", btl, "-n", str(ranks), sys.executable, __file__, "mpi"]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(found.stdout)


def tell(name, seconds):
    if os.environ.get("KILN_BENCH_ONLY", "") in name:
        print(json.dumps({"name": name, "unit": "us", "value": 1e6 * seconds}), flush=True)


def main():
    for ranks in [2, 4]:
        by_gloo = gloo(ranks)
        shared = tcp = None
        if shutil.which("mpirun"):
            shared, tcp = open_mpi(ranks, "vader,self"), open_mpi(ranks, "tcp,self")
        for side, of_mpi in [("threads", shared), ("tcp", tcp), ("tcp, ring", tcp)]:
            for at, (size, _) in enumerate(SIZES):
                tell(f"{side} / gloo: {ranks} ranks, {size}", by_gloo[at])
                if of_mpi:
                    tell(f"{side} / Open MPI: {ranks} ranks, {size}", of_mpi[at])


if __name__ == "__main__":
    mpi_rank() if sys.argv[1:] == ["mpi"] else main()
