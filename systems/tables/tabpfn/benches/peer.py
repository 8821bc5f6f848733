"""What the benchmarks of this crate compare with: prediction by the package `tabpfn` (version 1, PyTorch) with a network of
the published size and random weights, and the baselines of scikit-learn and XGBoost.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions after a
warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import os
import statistics
import time
import typing
import warnings

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from xgboost import XGBClassifier

# The package imports this name from a module of PyTorch that no longer has it.
torch.nn.modules.transformer.Optional = typing.Optional
from tabpfn import encoders  # noqa: E402
from tabpfn.scripts.transformer_prediction_interface import transformer_predict  # noqa: E402
from tabpfn.transformer import TransformerModel  # noqa: E402

THREADS = 2
TABLES = [(100, 100, 10), (500, 500, 30), (1000, 1000, 100)]


def network():
    """The published architecture, without its download: time does not hang on the weights."""
    model = TransformerModel(
        encoders.Linear(100, 512, replace_nan_by_zero=True), 10, 512, 4, 1024, 12, 0.0,
        y_encoder=encoders.Linear(1, 512), efficient_eval_masking=True)
    model.eval()
    return model


def workload(p, m, columns):
    rng = np.random.default_rng(columns)
    train, test = rng.normal(size=(p, columns)), rng.normal(size=(m, columns))
    return train, (train[:, 0] > 0).astype(int), test


def predict(model, work, members):
    train, labels, test = work
    x = torch.tensor(np.concatenate([train, test]), dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(np.concatenate([labels, np.zeros(len(test))]), dtype=torch.float32).unsqueeze(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformer_predict(
            model, x, y, len(train), device="cpu", N_ensemble_configurations=members, seed=0,
            softmax_temperature=torch.log(torch.tensor([0.8])), multiclass_decoder="permutation",
            preprocess_transform="mix", feature_shift_decoder=True, max_features=100, no_grad=True,
            batch_size_inference=32)


def median_milliseconds(work, repetitions):
    work()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def scaled(classifier, work):
    train, labels, test = work
    scaler = StandardScaler().fit(train)
    return classifier.fit(scaler.transform(train), labels).predict_proba(scaler.transform(test))


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    only = os.environ.get("KILN_BENCH_ONLY", "")

    def show(name, unit, measure):
        if only in name:
            print(json.dumps({"name": name, "unit": unit, "value": round(measure(), 4)}), flush=True)

    model = network()

    def memory():
        # How far the process rises above where it stands now, in KiB on Linux.
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        status = lambda field: next(
            int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
        before = status("VmRSS:")
        predict(model, workload(*TABLES[2]), 3)
        return (status("VmHWM:") - before) / 1024

    show("memory of predict p=1000 m=1000 F=100 members=3", "MiB", memory)
    for p, m, columns in TABLES:
        work = workload(p, m, columns)
        for members in [1, 3, 32]:
            if members == 32 and p == 1000:
                continue
            repetitions = 1 if members * p > 1000 else 3
            show(f"predict p={p} m={m} F={columns} members={members}", "ms",
                 lambda: median_milliseconds(lambda: predict(model, work, members), repetitions))
    work = workload(*TABLES[1])
    for name, make in [
        ("logreg", lambda: LogisticRegression(max_iter=1000)),
        ("knn", lambda: KNeighborsClassifier(5)),
        ("gbdt", lambda: XGBClassifier(n_jobs=THREADS)),
        ("rf", lambda: RandomForestClassifier(n_jobs=THREADS)),
    ]:
        show(f"{name} fit and predict p=500 m=500 F=30", "ms",
             lambda: median_milliseconds(lambda: scaled(make(), work), 3))
    train, labels, _ = workload(*TABLES[2])
    show("gbdt fit p=1000 F=100", "ms",
         lambda: median_milliseconds(lambda: XGBClassifier(n_jobs=THREADS).fit(train, labels), 3))


if __name__ == "__main__":
    main()
