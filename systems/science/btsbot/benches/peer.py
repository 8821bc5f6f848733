"""What the benchmarks of this crate compare with: the network of the btsbot package in PyTorch, and packets by fastavro and
astropy.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it. Packets are those of the shared data
(KILN_SHARED, by default ../shared beside the repository); without them, those figures are left out.
"""

import glob
import gzip
import io
import json
import os
import pathlib
import statistics
import time

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

THREADS = 2
REPETITIONS = 5
SIDE = 63
CONFIG = {
    "metadata_cols": list(range(25)),
    "conv1_channels": 32, "conv2_channels": 64, "conv_kernel": 5, "conv_dropout1": 0.5, "conv_dropout2": 0.55,
    "meta_fc1_neurons": 128, "meta_fc2_neurons": 128, "meta_dropout": 0.25,
    "comb_fc1_neurons": 8, "comb_fc2_neurons": 8, "comb_dropout": 0.2,
}  # fmt: skip
FIELDS = ["sgscore1", "distpsnr1", "sgscore2", "distpsnr2", "fwhm", "magpsf", "sigmapsf", "chipsf", "ra", "dec"]
FIELDS += ["diffmaglim", "ndethist", "nmtchps", "ncovhist", "chinr", "sharpnr", "scorr", "sky"]


def median_milliseconds(work):
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def network():
    from btsbot.architectures import mm_cnn

    return mm_cnn(CONFIG)


def forward():
    model, images, meta = network().eval(), torch.randn(64, 3, SIDE, SIDE), torch.randn(64, 25)

    def work():
        with torch.no_grad():
            for _ in range(16):
                model(images, meta)

    return median_milliseconds(work)


def step():
    model, images, meta = network().train(), torch.randn(64, 3, SIDE, SIDE), torch.randn(64, 25)
    labels = (torch.arange(64) % 2 == 0).float()[:, None]
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)

    def work():
        adam.zero_grad()
        binary_cross_entropy_with_logits(model(images, meta), labels).backward()
        adam.step()

    return median_milliseconds(work)


def packets():
    here = pathlib.Path(__file__).resolve().parents[4]
    shared = os.environ.get("KILN_SHARED", str(here.parent / "shared"))
    return [open(path, "rb").read() for path in sorted(glob.glob(f"{shared}/data/ztf-alerts/packets/*.avro"))]


def stamp(packed):
    from astropy.io import fits

    with gzip.open(io.BytesIO(packed), "rb") as file:
        with fits.open(io.BytesIO(file.read()), ignore_missing_simple=True) as hdus:
            pixels = hdus[0].data
    pixels = np.nan_to_num(pixels)
    norm = np.linalg.norm(pixels)
    pixels = pixels / norm if norm else pixels
    short = [(0, SIDE - n) for n in pixels.shape]
    return np.pad(pixels, short, constant_values=1e-9)


def inputs(packet):
    import fastavro

    alert = next(iter(fastavro.reader(io.BytesIO(packet))))
    stamps = np.stack([stamp(alert[f"cutout{name}"]["stampData"]) for name in ("Science", "Template", "Difference")])
    candidate = alert["candidate"]
    known = [p for p in alert["prv_candidates"] or [] if p["magpsf"] is not None and p["isdiffpos"] in ("t", "1")]
    known.append(candidate)
    magnitudes = [p["magpsf"] for p in known]
    first = min([candidate["jdstarthist"]] + [p["jd"] for p in known])
    peak = known[int(np.argmin(magnitudes))]["jd"]
    derived = [candidate["jd"] - first, candidate["jd"] - peak, peak - first, min(magnitudes), max(magnitudes)]
    derived += [candidate["ncovhist"] - candidate["ndethist"], candidate.get("drb") or candidate["rb"]]
    return stamps.astype(np.float32), np.array([candidate[name] for name in FIELDS] + derived, dtype=np.float32)


def decode():
    found = packets()

    def work():
        for packet in found:
            inputs(packet)

    return median_milliseconds(work) / len(found) if found else None


def latency():
    found, model, turn = packets(), network().eval(), [0]

    def work():
        turn[0] = (turn[0] + 1) % len(found)
        stamps, features = inputs(found[turn[0]])
        with torch.no_grad():
            model(torch.from_numpy(stamps)[None], torch.from_numpy(features)[None])

    return median_milliseconds(work) if found else None


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, measure in [
        ("forward, 1024 alerts", forward),
        ("training step, 64 alerts", step),
        ("packet to stamps and features, one core", decode),
        ("packet to score", latency),
    ]:
        if only in name and (value := measure()) is not None:
            print(json.dumps({"name": name, "unit": "ms", "value": round(value, 4)}), flush=True)


if __name__ == "__main__":
    main()
