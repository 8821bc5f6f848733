"""What the benchmarks of this crate compare with: torchvision's classifiers, a U-Net of the same layers in PyTorch, and
Score-CAM over torchvision's ResNet-18, in batches of 32 masked images.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import os
import statistics
import time

import torch
import torchvision
from torch import nn
from torch.nn.functional import interpolate

THREADS = 2
REPETITIONS = 5
MAPS = 32


def median_milliseconds(work):
    with torch.inference_mode():
        work()
        seconds = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def classify(name):
    network = getattr(torchvision.models, name)(num_classes=2).eval()
    x = torch.randn(8, 3, 224, 224)
    return median_milliseconds(lambda: network(x))


def block(inputs, outputs):
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        widths = [width << level for level in range(5)]
        self.enc = nn.ModuleList(block(a, b) for a, b in zip([1, *widths], widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[3::-1])
        self.dec = nn.ModuleList(block(2 * w, w) for w in widths[3::-1])
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        skips = []
        for level, enc in enumerate(self.enc):
            x = enc(nn.functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for up, dec, skip in zip(self.up, self.dec, skips[3::-1]):
            x = dec(torch.cat([skip, up(x)], 1))
        return self.out(x)


def segment():
    network = UNet().eval()
    x = torch.randn(2, 1, 256, 256)
    return median_milliseconds(lambda: network(x))


def explain():
    network = torchvision.models.resnet18(num_classes=2).eval()
    trunk = nn.Sequential(*list(network.children())[:-2])
    x = torch.randn(1, 3, 224, 224)

    def work():
        maps = trunk(x)[0].unsqueeze(1)
        baseline = network(torch.zeros_like(x)).softmax(1)[0, 1]
        scores = []
        for part in maps.split(MAPS):
            part = interpolate(part, size=224, mode="bilinear", align_corners=False)
            low, high = part.amin((2, 3), keepdim=True), part.amax((2, 3), keepdim=True)
            part = (part - low) / (high - low).clamp(min=1e-12)
            scores.append(network(x * part).softmax(1)[:, 1] - baseline)
        weights = torch.cat(scores).softmax(0)
        return (weights[:, None, None] * maps[:, 0]).sum(0).relu()

    return median_milliseconds(work)


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, measure in [
        ("resnet18 forward, 8 x 224 px", lambda: classify("resnet18")),
        ("densenet121 forward, 8 x 224 px", lambda: classify("densenet121")),
        ("mobilenet forward, 8 x 224 px", lambda: classify("mobilenet_v2")),
        ("U-Net forward, 2 x 256 px", segment),
        ("Score-CAM of resnet18, 512 maps, 224 px", explain),
    ]:
        if only in name:
            print(json.dumps({"name": name, "unit": "ms", "value": round(measure(), 4)}), flush=True)


if __name__ == "__main__":
    main()
