"""What the benchmark of this crate compares with: exact products of unsigned and signed bytes, and the networks that Kiln
has quantised and written as ONNX files, in onnxruntime.

Prints one JSON object a line, {"name", "unit", "value"}: the median of several repetitions after a warm-up, on one
thread and on two; and how far the resident set of a process rises that only reads a network and runs it three times.
The weight of a product is a constant, which onnxruntime packs when the session begins, as Kiln does. On x86 processors
without VNNI, products of bytes overflow by default; "exact products" are those with session.x64quantprecision.
KILN_BENCH_ONLY=substring measures only what has it in its name.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime

PRODUCTS = [(512, 512, 512), (128, 768, 3072), (1, 768, 3072)]
NETWORKS = ["resnet-s", "mobilenetv2-s", "bert-s"]
MEMORY_VARIABLE = "KILN_BENCH_MEMORY"


def session(model, threads, exact=False):
    """`model` is a path or bytes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def product(rows, inner, columns):
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).integers(-127, 128, (inner, columns), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, inner])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [rows, columns])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(128, np.uint8), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def inputs(session):
    """Random numbers for whatever a network reads."""
    rng = np.random.default_rng(1)
    [port] = session.get_inputs()
    if port.type == "tensor(float)":
        return {port.name: rng.random(port.shape, np.float32)}
    return {port.name: rng.integers(1, 4000, port.shape, dtype=np.int64)}


def network_file(name, batch):
    """Where Kiln's side has written it."""
    return os.path.join(tempfile.gettempdir(), "kiln-bench-ptq", f"{name}.{batch}.onnx")


def median_milliseconds(work, at_least=20, seconds=0.5):
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


def peak_bytes(path):
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # forgets the highest point so far
    run = session(path, 2)
    for _ in range(3):
        run.run(None, inputs(run))
    return resident("VmHWM") - before


def show(name, unit, value):
    print(json.dumps({"name": name, "unit": unit, "value": round(value, 4)}), flush=True)


def products(only):
    for rows, inner, columns in PRODUCTS:
        name = f"bytes {rows}x{inner}x{columns}"
        if only not in name:
            continue
        x = np.random.default_rng(1).integers(0, 256, (rows, inner), dtype=np.uint8)
        for threads in (1, 2):
            run = session(product(rows, inner, columns), threads)
            show(f"{name}, threads {threads}", "ms", median_milliseconds(lambda: run.run(None, {"x": x})))


def networks(only):
    for name in NETWORKS:
        if only not in name:
            continue
        for batch in (1, 32):
            path = network_file(name, batch)
            for threads in (1, 2):
                for exact in (True, False):
                    run = session(path, threads, exact)
                    x = inputs(run)
                    how = "exact" if exact else "fast"
                    what = f"{name}, batch {batch}, threads {threads}, beside {how} products"
                    show(what, "ms", median_milliseconds(lambda: run.run(None, x)))
            environment = dict(os.environ, **{MEMORY_VARIABLE: path})
            child = subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE)
            show(f"memory of {name}, batch {batch}", "MiB", int(child.stdout) / 2**20)


def main():
    if path := os.environ.get(MEMORY_VARIABLE):
        print(peak_bytes(path))
        return
    only = os.environ.get("KILN_BENCH_ONLY", "")
    products(only)
    networks(only)


if __name__ == "__main__":
    main()
