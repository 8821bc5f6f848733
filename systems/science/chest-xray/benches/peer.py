"""What the benchmarks of this crate compare with: torchvision's classifiers, a U-Net of the same layers in PyTorch, and
pytorch-grad-cam's Score-CAM of torchvision's ResNet-18, in batches of 32 masked images.

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
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    network = torchvision.models.resnet18(num_classes=2).eval()
    x = torch.randn(1, 3, 224, 224)
    cam = ScoreCAM(model=network, target_layers=[network.layer4[-1]])
    cam.batch_size = MAPS
    return median_milliseconds(lambda: cam(input_tensor=x, targets=[ClassifierOutputSoftmaxTarget(1)]))


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
