"""What the benchmarks of this crate compare with: tensorly's HALS on the same tensor.

graph-tool, the peer of the block model, comes in no wheel; its figure is measured where it can be imported.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import os
import statistics
import time

import numpy as np
import tensorly as tl
from tensorly.decomposition import non_negative_parafac_hals

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
    tensor = tl.tensor(np.random.default_rng(0).random((800, 6, 4465), dtype=np.float32))
    return median_seconds(
        lambda: non_negative_parafac_hals(tensor, rank=8, n_iter_max=50, init="random", random_state=0, tol=0)
    )


def communities():
    import graph_tool.all as gt

    rng = np.random.default_rng(0)
    group = rng.integers(0, 5, 125)
    pairs = [(i, j) for i in range(125) for j in range(i) if rng.random() < (0.5 if group[i] == group[j] else 0.12)]
    graph = gt.Graph(pairs, directed=False)
    weights = graph.new_ep("double", vals=rng.exponential(1.0, len(pairs)))
    state = {"recs": [weights], "rec_types": ["real-exponential"]}
    return median_seconds(lambda: gt.minimize_nested_blockmodel_dl(graph, state_args=state))


def main():
    only = os.environ.get("KILN_BENCH_ONLY", "")
    figures = [("50 sweeps of HALS, 800 x 6 x 4465, rank 8", hals)]
    try:
        import graph_tool  # noqa: F401

        figures.append(("nested block model, 125 nodes, 1500 edges", communities))
    except ImportError:
        pass
    for name, measure in figures:
        if only in name:
            print(json.dumps({"name": name, "unit": "s", "value": round(measure(), 4)}), flush=True)


if __name__ == "__main__":
    main()
