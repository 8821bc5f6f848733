"""Writes small networks with random weights as PyTorch's exporters have them, with inputs, to the folder `pytorch`.

They need torch, onnx and onnxscript, which are too large to be installed for every run of the checks.
"""

import io
import pathlib

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)


def bare(model):
    """The model without notes on where in which program a node was made."""
    model = onnx.load_from_string(model)
    graph = model.graph
    for part in [model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        del part.metadata_props[:]
        part.doc_string = ""
    return model.SerializeToString()


class Basic(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        same = stride == 1 and into == out
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(into, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.two(self.one(x)) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        widths = [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1)]
        self.blocks = nn.Sequential(*[Basic(*width) for width in widths])
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1), 1))


class Inverted(nn.Module):
    def __init__(self, into, out, stride, wider):
        super().__init__()
        self.same = stride == 1 and into == out
        hidden = into * wider
        self.body = nn.Sequential(
            nn.Conv2d(into, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return x + self.body(x) if self.same else self.body(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.blocks = nn.Sequential(Inverted(8, 8, 1, 1), Inverted(8, 12, 2, 6), Inverted(12, 12, 1, 6))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 10))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean([2, 3]))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, mask=None):
        batch, length, width = x.shape
        apart = lambda y: y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(apart(self.q(x)), apart(self.k(x)), apart(self.v(x)), attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    def __init__(self, width, heads, first):
        super().__init__()
        self.first = first
        self.attention = Attention(width, heads)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, mask=None):
        if self.first:
            x = x + self.attention(self.norms[0](x), mask)
            return x + self.mlp(self.norms[1](x))
        x = self.norms[0](x + self.attention(x, mask))
        return self.norms[1](x + self.mlp(x))


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(50, 16), nn.Embedding(32, 16), nn.Embedding(2, 16)
        self.norm = nn.LayerNorm(16)
        self.layers = nn.ModuleList([Layer(16, 4, False) for _ in range(2)])
        self.pool, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask, token_type_ids):
        places = torch.arange(input_ids.shape[1])
        x = self.norm(self.words(input_ids) + self.places(places) + self.kinds(token_type_ids))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(torch.tanh(self.pool(x[:, 0])))


class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 17, 16))
        self.layers = nn.ModuleList([Layer(16, 4, True) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


image = torch.randn(2, 3, 32, 32)
ids, kinds = torch.randint(0, 50, (2, 9)), torch.randint(0, 2, (2, 9))
mask = torch.ones(2, 9, dtype=torch.int64)
mask[1, 6:] = 0
words = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
for name, network, inputs in [("resnet", ResNet(), {"x": image}), ("mobilenet", MobileNet(), {"x": image}),
                              ("bert", Bert(), words), ("vit", Vit(), {"x": image})]:
    network = network.eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    for opset, dynamo in ((14, False), (17, False), (18, True)):
        open_sizes = {key: {0: "batch"} for key in inputs}
        how = {"dynamo": True, "verbose": False} if dynamo else {"dynamo": False, "dynamic_axes": open_sizes}
        file = io.BytesIO()
        torch.onnx.export(network, tuple(inputs.values()), file, input_names=[*inputs], opset_version=opset, **how)
        path = pathlib.Path(__file__).parent / "pytorch" / f"{name}-{'dynamo' if dynamo else opset}.onnx"
        path.write_bytes(bare(file.getvalue()))
        np.savez_compressed(path.with_suffix(".npz"), **arrays)
