"""The tables: exact rows from files of known content, and nothing done twice."""
import argparse
import json
import os

import reproduce
import sample
import train

VALUES = {"mean_distance": 0.01, "covariance_distance": 0.02, "log_density": -1.0, "log_density_data": -1.5,
          "test_loss": 0.4, "optimum": 0.3, "epochs_trained": 5, "mean_distance_floor": {"mean": 0.005, "std": 0.001},
          "covariance_distance_floor": {"mean": 0.006, "std": 0.002}}


def test_rows_and_caching(tmp_path, monkeypatch):
    calls = []

    def fake_train(argv):
        options = dict(zip(argv[::2], argv[1::2]))
        calls.append(("train", options["--data"], options["--target"], options["--seed"], options["--epochs"]))
        folder = tmp_path / f"{options['--data']}-{options['--target']}-mse-s{options['--seed']}"
        folder.mkdir(exist_ok=True)
        (folder / "ckpt.pt").touch()

    def fake_sample(argv):
        options = dict(zip(argv[::2], argv[1::2]))
        calls.append(("sample", options["--steps"], options["--seed"]))
        out = os.path.join(options["--out"], "metrics.json")
        os.makedirs(options["--out"], exist_ok=True)
        shift = 0.01 * int(options["--seed"])
        with open(out, "w") as file:
            json.dump({**VALUES, "mean_distance": 0.01 + shift, "log_density": -1.0 + shift}, file)
    monkeypatch.setattr(train, "main", fake_train)
    monkeypatch.setattr(sample, "main", fake_sample)
    args = argparse.Namespace(runs=str(tmp_path), seeds=3, epochs=5, device="cpu")

    lines = list(reproduce.moments(args))
    assert len(lines) == 2 + 8 and len(calls) == 2 * 24
    assert lines[2] == ("| clusters | eps | 0.400 +- 0.000 | 0.300 | 0.020 +- 0.010 | 0.005 +- 0.001 | 0.063 | "
                        "0.020 +- 0.000 | 0.006 +- 0.002 | 0.143 |")
    assert calls[:2] == [("train", "clusters", "eps", "0", "5"), ("sample", "512", "0")]
    calls.clear()
    assert list(reproduce.moments(args)) == lines and not calls                   # nothing twice
    ckpt, made = tmp_path / "rings-v-mse-s1" / "ckpt.pt", tmp_path / "rings-v-mse-s1" / "steps-512" / "metrics.json"
    os.utime(ckpt, (made.stat().st_mtime + 10,) * 2)                              # trained again since
    assert reproduce.result(args, "rings", "v", 1, 512)["mean_distance"] == 0.02 and len(calls) == 2
    ckpt.unlink()
    calls.clear()
    reproduce.result(args, "rings", "v", 1, 512)                                  # killed after --overwrite
    reproduce.result(argparse.Namespace(**{**vars(args), "epochs": 7}), "rings", "v", 1, 512)
    assert [c[0] for c in calls] == ["train", "sample"] * 2 and calls[2][-1] == "7"
    results = [json.loads((tmp_path / f"waves-v-mse-s{s}" / "steps-512" / "metrics.json").read_text()) for s in range(3)]
    assert reproduce.gap(results) == "0.510 +- 0.010" and reproduce.cell(results[:1], "optimum") == "0.300"
    row = [line for line in lines if line.startswith("| waves | v")][0]
    assert row.endswith("0.027 |") and "| 0.013 |" in row                         # the thesis's numbers
