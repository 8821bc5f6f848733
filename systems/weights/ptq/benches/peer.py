"""What the benchmark of this crate compares with: exact products of unsigned and signed bytes in onnxruntime.

Prints one JSON object a line, {"name", "unit", "value"}: the median of several repetitions after a warm-up, on one
thread and on two. The weight is a constant, which onnxruntime packs when the session begins, as Kiln does.
"""

import json
import statistics
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

PRODUCTS = [(512, 512, 512), (128, 768, 3072), (1, 768, 3072)]


def session(rows, inner, columns, threads):
    weight = np.random.default_rng(0).integers(-127, 128, (inner, columns), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, inner])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [rows, columns])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(128, np.uint8), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def median_milliseconds(work, at_least=20, seconds=0.5):
    for _ in range(2):
        work()
    times = []
    while len(times) < at_least or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main():
    for rows, inner, columns in PRODUCTS:
        x = np.random.default_rng(1).integers(0, 256, (rows, inner), dtype=np.uint8)
        for threads in (1, 2):
            run = session(rows, inner, columns, threads)
            value = median_milliseconds(lambda: run.run(None, {"x": x}))
            name = f"bytes {rows}x{inner}x{columns}, threads {threads}"
            print(json.dumps({"name": name, "unit": "ms", "value": round(value, 4)}), flush=True)


if __name__ == "__main__":
    main()
