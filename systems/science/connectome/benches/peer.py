"""What the benchmarks of this crate compare with: tensorly's HALS, and graph-tool's block model of the same graph.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np

REPETITIONS = 3


def median_seconds(work):
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def hals():
    import tensorly as tl
    from tensorly.decomposition import non_negative_parafac_hals

    tensor = tl.tensor(np.random.default_rng(0).random((800, 6, 4465), dtype=np.float32))
    return median_seconds(
        lambda: non_negative_parafac_hals(tensor, rank=8, n_iter_max=50, init="random", random_state=0, tol=0)
    )


def drawn(number):
    """A number from 0 to 1 that both sides draw alike (the permutation of PCG)."""
    x = (number * 747796405 + 2891336453) % 2**32
    x = (((x >> ((x >> 28) + 4)) ^ x) * 277803737) % 2**32
    return ((x >> 22) ^ x) / 2**32


def planted():
    """The edges of a graph of 125 nodes in five groups, and their weights."""
    pairs = [(i, j) for i in range(125) for j in range(i)]
    edges = [(i, j) for i, j in pairs if drawn(i * 125 + j) < (0.5 if i % 5 == j % 5 else 0.12)]
    return edges, [-np.log(1 - drawn(20000 + i * 125 + j)) * (2 if i % 5 == j % 5 else 1) for i, j in edges]


def communities():
    """Seconds, and the description length in nats of the best of three searches."""
    import graph_tool.all as gt

    edges, weights = planted()
    graph = gt.Graph(directed=False)
    graph.add_vertex(125)
    graph.add_edge_list(edges)
    state = {"recs": [graph.new_ep("double", vals=weights)], "rec_types": ["real-exponential"]}
    lengths = []
    seconds = median_seconds(
        lambda: lengths.append(gt.minimize_nested_blockmodel_dl(graph, state_args=state).entropy())
    )
    return seconds, min(lengths)


def figures_of_communities():
    """graph-tool comes with the system (python3-graph-tool in Debian), so it is asked through the system's Python."""
    python = shutil.which("python3", path="/usr/bin")
    if not python:
        return
    asked = subprocess.run([python, __file__, "communities"], capture_output=True, text=True)
    if asked.returncode == 0:
        seconds, length = json.loads(asked.stdout)
        yield "nested block model, 125 nodes, 1500 edges", "s", seconds
        yield "its description length", "nats", length
    else:
        print("graph-tool was not found: the block model is not compared", file=sys.stderr)


def main():
    if sys.argv[1:] == ["communities"]:
        print(json.dumps(communities()))
        return
    only = os.environ.get("KILN_BENCH_ONLY", "")
    name = "50 sweeps of HALS, 800 x 6 x 4465, rank 8"
    if only in name:
        print(json.dumps({"name": name, "unit": "s", "value": round(hals(), 4)}), flush=True)
    for name, unit, value in figures_of_communities():
        if only in name:
            print(json.dumps({"name": name, "unit": unit, "value": round(value, 4)}), flush=True)


if __name__ == "__main__":
    main()
