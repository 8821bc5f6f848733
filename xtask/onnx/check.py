"""ONNX models between Kiln and ONNX Runtime.

usage: check.py KILN FOLDER

Models that are made here are imported by Kiln and compared with ONNX Runtime, and written again by Kiln and compared once
more; so are models of Kiln's own systems. One line a model: `ok <name>` or `FAILED <name>: <what>`. With PyTorch
installed, its exporter makes four networks more. FOLDER takes the files.
"""

import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

KILN, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
TOLERANCE = 2e-5
# 8-bit integers that Kiln writes as it read them.
KEPT_QUANTISED = {"QuantizeLinear", "QuantizeLinear-channels", "QuantizeLinear-uint8", "DequantizeLinear"}
random = np.random.default_rng(0)


def kiln(*words):
    done = subprocess.run([KILN, *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())


def runtime(model, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Without fusions, so that it computes what the file says.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))


def compare(ours, theirs):
    for name, expected in theirs.items():
        found = ours[name].astype(np.float64)
        expected = expected.astype(np.float64)
        if found.shape != expected.shape:
            raise RuntimeError(f"{name} is {found.shape}, should be {expected.shape}")
        gap = np.abs(found - expected) / (1 + np.abs(expected))
        if not np.all((gap <= TOLERANCE) | (found == expected)):
            raise RuntimeError(f"{name} differs by {np.nanmax(gap):.2e}")


def imported(name, model, inputs, dims=()):
    """Imports a model, runs it on inputs and compares with ONNX Runtime."""
    here = FOLDER / "imported" / name
    here.mkdir(parents=True, exist_ok=True)
    path = here / "model.onnx"
    path.write_bytes(model)
    sizes = [word for dim in dims for word in ("--dim", dim)]
    kiln("graph", "import", "--onnx", path, *sizes, "--out", here / "graph")
    wide = lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x.astype(np.int64)
    np.savez(here / "in.npz", **{key: wide(value) for key, value in inputs.items()})
    kiln("graph", "run", "--graph", here / "graph", "--inputs", here / "in.npz", "--out", here / "out.npz")
    compare(np.load(here / "out.npz"), runtime(model, inputs))
    # And back: what Kiln writes means the same to ONNX Runtime.
    kiln("graph", "export", "--graph", here / "graph", "--onnx", here / "again.onnx")
    again = onnx.load(here / "again.onnx")
    onnx.checker.check_model(again, full_check=True)
    if name in KEPT_QUANTISED and not any(node.op_type == "DequantizeLinear" for node in again.graph.node):
        raise RuntimeError("is no longer quantised")
    inputs = {key: wide(value) for key, value in inputs.items()}
    compare(np.load(here / "out.npz"), runtime((here / "again.onnx").read_bytes(), inputs))


def exported(name, *training):
    """A model that a system of Kiln trained, in both."""
    here = FOLDER / "trained" / name
    here.mkdir(parents=True, exist_ok=True)
    (here / "text.txt").write_text("to be or not to be. " * 40)
    rows = [",".join(str(i * p % 10) for p in range(16)) + f",{('up', 'down')[i % 2]}" for i in range(40)]
    (here / "rows.csv").write_text("\n".join([",".join(f"p{p}" for p in range(16)) + ",label", *rows]))
    kiln(name, *[word.replace("@", f"{here}/") for line in training for word in line.split()])
    kiln("graph", "export", "--model", here / "m", "--onnx", here / "model.onnx")
    model = onnx.load(here / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    inputs = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        is_float = value.type.tensor_type.elem_type == TensorProto.FLOAT
        inputs[value.name] = f32(*shape) if is_float else random.integers(0, 2, shape)
    np.savez(here / "in.npz", **inputs)
    kiln("graph", "run", "--model", here / "m", "--inputs", here / "in.npz", "--out", here / "out.npz")
    compare(np.load(here / "out.npz"), runtime((here / "model.onnx").read_bytes(), inputs))


def quantised_network(bits):
    """A network that Kiln quantised, by its own kernels and by ONNX Runtime's, as it is written and fused."""
    here = FOLDER / "quantised" / bits
    here.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((60, 8, 8), np.float32)
    for number, image in enumerate(pixels):
        image += random.integers(0, 6, (8, 8))
        place = random.integers(0, 8)
        image[(place, slice(None)) if number % 2 else (slice(None), place)] = 16
    rows = [",".join(f"{p:g}" for p in image.ravel()) + f",{number % 2}" for number, image in enumerate(pixels)]
    data = here / "rows.csv"
    data.write_text("\n".join([",".join(f"p{p}" for p in range(64)) + ",label", *rows]))
    kiln("ptq", "train", "--arch", "mobilenetv2-s", "--width", "0.25", "--batch", 16, "--data", data, "--epochs", 4, "--out", here / "m")
    kiln("ptq", "quantize", "--model", here / "m", "--calib", data, "--valid", data, "--examples", 16, "--probes", 1, "--no-pairs",
         "--bits", bits, "--target", 0.01, "--out", here / "q", "--export", here / "q.onnx")
    kiln("ptq", "export", "--model", here / "q", "--opset", 21, "--to", here / "q21.onnx")
    kiln("ptq", "predict", "--model", here / "q", "--input", data, "--out", here / "y.npz")
    ours = np.load(here / "y.npz")["y"]
    for file in ("q.onnx", "q21.onnx"):
        compare_quantised(here / file, pixels, ours)


def compare_quantised(file, pixels, ours):
    """A quantised network as ONNX Runtime computes it, as it is written and fused."""
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise RuntimeError("is not quantised")
    name = model.graph.input[0].name
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        # Without VNNI its kernels overflow otherwise.
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        theirs = np.concatenate([session.run(None, {name: image[None, None] / 16})[0] for image in pixels])
        gap = np.abs(theirs - ours).max(axis=1) / np.abs(ours).max()
        # A number at the border of two steps may go either way, and later units amplify it.
        if np.mean(gap < 1e-4) < 0.9 or gap.max() > 0.1:
            raise RuntimeError(f"{file.name}, {level}: differs by {gap.max():.2e}, {np.mean(gap < 1e-4):.0%} of the rows agree")


# Models of one operator.

def f32(*shape):
    return random.standard_normal(shape).astype(np.float32)


KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32, "bool": TensorProto.BOOL,
         "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8}


def model_of(nodes, inputs, outputs, parameters=(), opset=17):
    """`inputs`: name -> array, `outputs`: name -> element type, `parameters`: name -> array."""
    graph = helper.make_graph(
        nodes, "one",
        [helper.make_tensor_value_info(name, KINDS[str(x.dtype)], x.shape) for name, x in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(x, name) for name, x in dict(parameters).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return model.SerializeToString()


def single(operator, inputs, parameters=(), opset=17, outputs=1, kind=TensorProto.FLOAT, order=None, **attributes):
    names = order or [*inputs, *dict(parameters)]
    results = [f"y{at}" for at in range(outputs)]
    node = helper.make_node(operator, names, results, **attributes)
    return model_of([node], inputs, {name: kind for name in results}, parameters, opset), inputs


def i64(*values):
    return np.array(values, np.int64)


def operators():
    x, y = f32(2, 3, 4), f32(2, 3, 4)
    for name in ("Abs Exp Erf Neg Sigmoid Sign Sin Cos Tanh Relu Floor Ceil Round Softplus HardSwish HardSigmoid Elu "
                 "LeakyRelu Identity Reciprocal Tan Sinh Cosh Atan Asinh").split():
        yield name, *single(name, {"x": x})
    for name in ("Log", "Sqrt", "Acosh"):
        yield name, *single(name, {"x": np.abs(x) + 1})
    for name in ("Asin", "Acos", "Atanh"):
        yield name, *single(name, {"x": np.clip(x, -0.9, 0.9)})
    for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"):
        yield name, *single(name, {"x": x, "y": y})
        yield f"{name}-broadcast", *single(name, {"x": x, "y": f32(3, 1)})
        yield f"{name}-number", *single(name, {"x": x}, {"c": np.float32(1.5)})
        yield f"{name}-number-first", *single(name, {"x": x}, {"c": np.float32(1.5)}, order=["c", "x"])
    yield "Pow", *single("Pow", {"x": np.abs(x)}, {"c": np.float32(2.5)})
    yield "Pow-tensor", *single("Pow", {"x": np.abs(x), "y": y})
    yield "Mod", *single("Mod", {"x": i64(7, -7, 5, -5), "y": i64(3, 3, -3, -3)}, kind=TensorProto.INT64)
    yield "Div-ints", *single("Div", {"x": i64(7, -7, 5, -5), "y": i64(3, 3, -3, -3)}, kind=TensorProto.INT64)
    for name in ("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal"):
        ints = {"x": random.integers(0, 3, (2, 5)), "y": random.integers(0, 3, (5,))}
        yield name, *single(name, ints, kind=TensorProto.BOOL)
    mask = {"a": random.random((2, 3)) > 0.5, "b": random.random((2, 3)) > 0.5}
    for name in ("And", "Or", "Xor"):
        yield name, *single(name, mask, kind=TensorProto.BOOL)
    yield "Not", *single("Not", {"a": mask["a"]}, kind=TensorProto.BOOL)
    yield "Where", *single("Where", {"m": mask["a"], "x": f32(2, 3), "y": f32(3)})
    yield "Cast-int", *single("Cast", {"x": 3 * x}, kind=TensorProto.INT64, to=TensorProto.INT64)
    yield "Cast-bool", *single("Cast", {"x": np.round(x)}, kind=TensorProto.BOOL, to=TensorProto.BOOL)
    yield "Cast-float", *single("Cast", {"x": i64(1, -2, 3)}, to=TensorProto.FLOAT)
    yield "Clip", *single("Clip", {"x": x}, {"lo": np.float32(-0.5), "hi": np.float32(0.5)})
    yield "Clip-6", *single("Clip", {"x": x}, opset=10, min=-0.5, max=0.5)
    yield "Clip-max", *single("Clip", {"x": x}, {"hi": np.float32(0.5)}, order=["x", "", "hi"])
    yield "Gelu", *single("Gelu", {"x": x}, opset=20)
    yield "Gelu-tanh", *single("Gelu", {"x": x}, opset=20, approximate="tanh")
    yield "PRelu", *single("PRelu", {"x": x}, {"s": f32(3, 1)})
    # Shapes.
    yield "Reshape", *single("Reshape", {"x": x}, {"s": i64(0, -1, 2)})
    yield "Flatten", *single("Flatten", {"x": x}, axis=2)
    yield "Transpose", *single("Transpose", {"x": x}, perm=[2, 0, 1])
    yield "Squeeze", *single("Squeeze", {"x": f32(1, 3, 1)}, {"a": i64(0)})
    yield "Squeeze-11", *single("Squeeze", {"x": f32(1, 3, 1)}, opset=11, axes=[-1])
    yield "Unsqueeze", *single("Unsqueeze", {"x": x}, {"a": i64(0, -1)})
    yield "Expand", *single("Expand", {"x": f32(3, 1)}, {"s": i64(2, 1, 4)})
    yield "Tile", *single("Tile", {"x": x}, {"r": i64(1, 2, 3)})
    yield "Concat", *single("Concat", {"x": x, "y": y}, axis=-1)
    yield "Split", *single("Split", {"x": x}, {"s": i64(1, 3)}, outputs=2, axis=2)
    yield "Split-even", *single("Split", {"x": f32(7, 2)}, opset=18, outputs=3, axis=0, num_outputs=3)
    yield "Slice", *single("Slice", {"x": f32(5, 6)}, {"s": i64(-3, 1), "e": i64(9, -1), "a": i64(0, 1), "t": i64(1, 2)})
    yield "Slice-back", *single("Slice", {"x": f32(5, 6)}, {"s": i64(-1), "e": i64(-9), "a": i64(1), "t": i64(-2)})
    yield "Gather", *single("Gather", {"x": x, "i": i64(2, 0)}, axis=1)
    yield "Gather-matrix", *single("Gather", {"x": f32(5, 3), "i": random.integers(0, 5, (2, 2))})
    yield "Gather-scalar", *single("Gather", {"x": x}, {"i": np.array(-1, np.int64)}, axis=1)
    yield "GatherElements", *single("GatherElements", {"x": x, "i": random.integers(0, 4, (2, 3, 2))}, axis=2)
    yield "Pad", *single("Pad", {"x": x}, {"p": i64(0, 1, 2, 0, 0, 1), "v": np.float32(7)})
    yield "Pad-reflect", *single("Pad", {"x": x}, {"p": i64(0, 0, 2, 0, 0, 1)}, mode="reflect")
    yield "Pad-edge", *single("Pad", {"x": x}, {"p": i64(0, 1, 0, 0, 0, 1)}, mode="edge")
    yield "Shape", *single("Shape", {"x": x}, kind=TensorProto.INT64, start=1)
    yield "Size", *single("Size", {"x": x}, kind=TensorProto.INT64)
    yield "Trilu", *single("Trilu", {"x": f32(3, 4)}, upper=0)
    yield "Trilu-k", *single("Trilu", {"x": f32(2, 3, 4)}, {"k": np.array(1, np.int64)})
    yield "CumSum", *single("CumSum", {"x": x}, {"a": np.array(1, np.int64)})
    yield "Range", *single("Range", {}, {"s": np.float32(1), "l": np.float32(4), "d": np.float32(0.5)})
    fill = numpy_helper.from_array(np.array([2.5], np.float32))
    yield "ConstantOfShape", *single("ConstantOfShape", {}, {"s": i64(2, 3)}, value=fill)
    # Along axes.
    for name in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"):
        yield name, *single(name, {"x": x}, axes=[1, -1], keepdims=0)
        yield f"{name}-18", *single(name, {"x": x}, {"a": i64(0)}, opset=18)
    yield "ReduceSum", *single("ReduceSum", {"x": x}, {"a": i64(0, 2)})
    yield "ReduceSum-all", *single("ReduceSum", {"x": x}, keepdims=0)
    yield "ArgMax", *single("ArgMax", {"x": x}, kind=TensorProto.INT64, axis=1)
    yield "ArgMin", *single("ArgMin", {"x": x}, kind=TensorProto.INT64, axis=-1, keepdims=0)
    for name in ("Softmax", "LogSoftmax"):
        yield name, *single(name, {"x": x}, axis=1)
        yield f"{name}-11", *single(name, {"x": x}, opset=11, axis=1)
    norm = {"s": f32(4), "b": f32(4)}
    yield "LayerNormalization", *single("LayerNormalization", {"x": x}, norm, epsilon=1e-3)
    yield "LayerNormalization-2", *single("LayerNormalization", {"x": x}, {"s": f32(3, 4)}, axis=1)
    channels = {"g": f32(3), "b": f32(3), "m": f32(3), "v": np.abs(f32(3))}
    yield "BatchNormalization", *single("BatchNormalization", {"x": f32(2, 3, 4, 4)}, channels)
    yield "BatchNormalization-1d", *single("BatchNormalization", {"x": x}, channels)
    # Products.
    yield "MatMul", *single("MatMul", {"x": f32(2, 3, 4), "y": f32(2, 4, 5)})
    yield "MatMul-broadcast", *single("MatMul", {"x": f32(2, 1, 3, 4), "y": f32(5, 4, 2)})
    yield "MatMul-weight", *single("MatMul", {"x": f32(2, 3, 4)}, {"w": f32(4, 5)})
    yield "MatMul-vectors", *single("MatMul", {"x": f32(4), "y": f32(2, 4, 3)})
    yield "MatMul-vector", *single("MatMul", {"x": f32(2, 3, 4), "y": f32(4)})
    yield "Gemm", *single("Gemm", {"x": f32(3, 4)}, {"w": f32(5, 4), "b": f32(5)}, transB=1)
    yield "Gemm-scaled", *single("Gemm", {"x": f32(4, 3)}, {"w": f32(4, 5), "b": f32(3, 1)}, transA=1, alpha=0.5, beta=2.0)
    # Windows.
    image = f32(2, 4, 7, 8)
    yield "Conv", *single("Conv", {"x": image}, {"w": f32(6, 2, 3, 3), "b": f32(6)}, group=2, strides=[2, 1],
                          pads=[1, 1, 1, 1])
    yield "Conv-uneven", *single("Conv", {"x": image}, {"w": f32(3, 4, 3, 2)}, pads=[0, 1, 2, 1], dilations=[2, 1])
    yield "Conv-depthwise", *single("Conv", {"x": image}, {"w": f32(4, 1, 3, 3)}, group=4, auto_pad="SAME_UPPER",
                                    strides=[2, 2])
    yield "Conv-1d", *single("Conv", {"x": f32(2, 3, 9)}, {"w": f32(5, 3, 4), "b": f32(5)}, pads=[2, 1])
    yield "ConvTranspose", *single("ConvTranspose", {"x": image}, {"w": f32(4, 2, 3, 3), "b": f32(2)}, strides=[2, 2],
                                   pads=[1, 1, 1, 1], output_padding=[1, 1])
    yield "ConvTranspose-1d", *single("ConvTranspose", {"x": f32(2, 4, 5)}, {"w": f32(4, 1, 3)}, group=2)
    yield "MaxPool", *single("MaxPool", {"x": image}, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    yield "MaxPool-uneven", *single("MaxPool", {"x": image}, kernel_shape=[3, 2], pads=[0, 0, 1, 1])
    yield "MaxPool-ceil", *single("MaxPool", {"x": image}, kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1)
    yield "MaxPool-1d", *single("MaxPool", {"x": f32(2, 3, 9)}, kernel_shape=[3], strides=[2])
    yield "AveragePool", *single("AveragePool", {"x": image}, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    yield "AveragePool-counted", *single("AveragePool", {"x": image}, kernel_shape=[3, 3], pads=[1, 0, 0, 1],
                                         count_include_pad=1)
    yield "AveragePool-1d", *single("AveragePool", {"x": f32(2, 3, 9)}, kernel_shape=[3], strides=[2])
    yield "GlobalAveragePool", *single("GlobalAveragePool", {"x": image})
    yield "GlobalMaxPool", *single("GlobalMaxPool", {"x": image})
    # Quantised numbers.
    scale, zero = np.float32(0.1), np.array(3, np.int8)
    yield "QuantizeLinear", *quantised(x, {"s": scale, "z": zero})
    yield "QuantizeLinear-channels", *quantised(x, {"s": np.abs(f32(3)) + 0.1, "z": np.array([1, 0, -4], np.int8)}, axis=1)
    yield "QuantizeLinear-uint8", *quantised(x, {"s": scale, "z": np.array(128, np.uint8)})
    weights = {"w": random.integers(-128, 128, (3, 4)).astype(np.int8), "s": np.abs(f32(4)) + 0.1}
    yield "DequantizeLinear", *dequantised(weights, axis=1)
    small = {"w": random.integers(-8, 8, (3, 5)), "s": np.abs(f32(3)) + 0.1}
    yield "DequantizeLinear-int4", *dequantised(small, int4=True, axis=0)
    blocks = {"w": random.integers(-128, 128, (3, 6)).astype(np.int8), "s": np.abs(f32(3, 2)) + 0.1}
    yield "DequantizeLinear-blocks", *dequantised(blocks, axis=1, block_size=3)
    # Types that are converted.
    halves = (np.arange(8) / 4).astype(np.float16)
    yield "float16", *single("Add", {"x": halves}, {"c": np.ones(8, np.float16)}, kind=TensorProto.FLOAT16)
    yield "float64", *single("Add", {"x": halves.astype(np.float64)}, {"c": np.ones(8)}, kind=TensorProto.DOUBLE)
    yield "int32", *single("Add", {"x": np.array([1, 2], np.int32)}, {"c": np.array([5, -6], np.int32)},
                           kind=TensorProto.INT32)


def quantised(x, parameters, **attributes):
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
             helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes)]
    return model_of(nodes, {"x": x}, {"y": TensorProto.FLOAT}, parameters), {"x": x}


def dequantised(parameters, int4=False, **attributes):
    x = f32(*parameters["w"].shape)
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"], **attributes),
             helper.make_node("Add", ["x", "d"], ["y"])]
    weights = parameters["w"]
    model = model_of(nodes, {"x": x}, {"y": TensorProto.FLOAT}, parameters, opset=21)
    if int4:
        model = onnx.load_model_from_string(model)
        packed = helper.make_tensor("w", TensorProto.INT4, weights.shape, weights.flatten().tolist())
        model.graph.initializer[0].CopyFrom(packed)
        model = model.SerializeToString()
    return model, {"x": x}


# Networks from PyTorch's exporters, which `pytorch.py` wrote.

def networks():
    for file in sorted((Path(__file__).parent / "pytorch").glob("*.onnx")):
        inputs = dict(np.load(file.with_suffix(".npz")))
        dims = () if file.stem.endswith("dynamo") else ("batch=2",)
        yield file.stem, file.read_bytes(), inputs, dims


def check(name, work):
    try:
        work()
        print(f"ok {name}", flush=True)
    except Exception as error:
        print(f"FAILED {name}: {error}", flush=True)


TRAINED = {
    "gla": ["train --text @text.txt --out @m --steps 2 --d-model 16 --layers 1 --heads 2 --seq-len 32 --batch 2"],
    "tcnca": ["train --task lm --text @text.txt --out @m --steps 2 --dim 8 --layers 2 --mixer tcn,ema --z-dim 4 --h-dim 8",
              "--ffn-dim 8 --kernel 3 --dilation 2 --blocks 2 --chunk 8 --batch 4 --seq-len 16"],
    "tabpfn": ["fit-prior --emsize 16 --layers 1 --heads 2 --hidden 16 --max-features 5 --max-classes 3 --rows 32",
               "--batch 2 --steps 2 --out @m"],
    "neumeta": ["pretrain --data @rows.csv --arch small --width 4 --batch 4 --steps 2 --out @m"],
    "stitch": ["anchor --width 4 --depth 2 --heads 2 --patch 2 --batch 4 --data @rows.csv --steps 2 --out @m"],
}

warnings.filterwarnings("ignore")
for name, model, inputs in operators():
    check(name, lambda: imported(name, model, inputs))
for name, model, inputs, dims in networks():
    check(name, lambda: imported(name, model, inputs, dims))
for name, training in TRAINED.items():
    check(f"trained {name}", lambda: exported(name, *training))
for bits in ("16,8", "16,8,4"):
    check(f"quantised {bits}", lambda: quantised_network(bits))
