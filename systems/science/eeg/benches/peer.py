"""What the benchmarks of this crate compare with: braindecode's networks in PyTorch, and mne's reading and resampling.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import os
import statistics
import tempfile
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy

THREADS = 2
REPETITIONS = 5
CHANNELS = ["A1", "A2", "C3", "C4", "CZ", "F3", "F4", "F7", "F8", "FP1", "FP2", "FZ", "O1", "O2", "P3", "P4", "PZ"]
CHANNELS += ["T3", "T4", "T5", "T6"]
RATE, MINUTES = 250, 20


def median_milliseconds(work):
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def step():
    from braindecode.models import ShallowFBCSPNet

    model = ShallowFBCSPNet(21, 2, n_times=6000, final_conv_length="auto")
    x, y = torch.randn(64, 21, 6000), torch.arange(64) % 2
    adam = torch.optim.AdamW(model.parameters(), lr=6.25e-4, weight_decay=5e-4)

    def work():
        adam.zero_grad()
        cross_entropy(model(x), y).backward()
        adam.step()

    return median_milliseconds(work)


def tcn():
    from braindecode.models import TCN

    model = TCN(21, 2, n_blocks=5, n_filters=55, kernel_size=16, drop_prob=0.5).eval()
    x = torch.randn(8, 21, 6000)
    with torch.no_grad():
        return median_milliseconds(lambda: model(x))


def write_edf(path):
    """21 channels of noise in records of a second."""
    count, seconds = len(CHANNELS), MINUTES * 60

    def field(values, width):
        return b"".join(str(value).ljust(width).encode() for value in values)

    header = field(["0"], 8) + field(["X"], 80) + field(["X"], 80) + field(["01.01.00"], 8) + field(["00.00.00"], 8)
    header += field([256 * (count + 1)], 8) + field([""], 44) + field([seconds], 8) + field([1], 8) + field([count], 4)
    header += field([f"EEG {name}-REF" for name in CHANNELS], 16) + field([""] * count, 80) + field(["uV"] * count, 8)
    header += field([-3276.8] * count, 8) + field([3276.7] * count, 8)
    header += field([-32768] * count, 8) + field([32767] * count, 8)
    header += field([""] * count, 80) + field([RATE] * count, 8) + field([""] * count, 32)
    noise = np.random.default_rng(0).normal(0, 300, seconds * count * RATE).astype("<i2")
    with open(path, "wb") as file:
        file.write(header + noise.tobytes())


def prepare():
    import mne

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.edf")
        write_edf(path)

        def work():
            raw = mne.io.read_raw_edf(path, preload=False, verbose="error")
            raw.crop(60, 360, include_tmax=False).load_data(verbose="error")
            raw.apply_function(lambda x: np.clip(x * 1e6, -800, 800), channel_wise=False, verbose="error")
            raw.resample(100, method="polyphase", verbose="error")
            eeg = raw.get_data()
            mean, std = eeg.mean(1, keepdims=True), eeg.std(1, keepdims=True)
            eeg = np.clip(eeg, mean - 2 * std, mean + 2 * std)
            return (eeg - eeg.mean(1, keepdims=True)) / eeg.std(1, keepdims=True)

        return median_milliseconds(work)


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, measure in [
        ("training step, ShallowNet, 64 x 21 x 6000", step),
        ("TCN forward, 8 x 21 x 6000", tcn),
        ("EDF of 20 min x 21 channels, prepared", prepare),
    ]:
        if only in name:
            print(json.dumps({"name": name, "unit": "ms", "value": round(measure(), 4)}), flush=True)


if __name__ == "__main__":
    main()
