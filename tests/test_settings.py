"""A setting is one row: command line, help, config, the check of a resumed run and stacks all follow from it."""
import math
import re
import runpy

import pytest

import ddpm
import losses
import run
import settings
import train
import unet

FAST = ["--data", "clusters", "--epochs", "1", "--batch-size", "10000", "--width", "8", "--device", "cpu"]


@pytest.fixture
def momentum(monkeypatch):
    """A new setting of points: its row and nothing else."""
    row = settings.Setting("first_moment", "Adam's", 0.9, argument=dict(type=settings.number(float, 0, 1)))
    monkeypatch.setattr(settings, "SETTINGS", [*settings.SETTINGS, row])


def exits_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and re.search(message, error), error


def test_every_row_is_once_in_the_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    out = capsys.readouterr().out
    names = re.findall(r"^  --([\w-]+)", out, re.M)
    rows = [row.name.replace("_", "-") for row in settings.SETTINGS]
    assert sorted(names) == sorted([*rows, "data", "target", "loss", "seed", "seeds", "device", "stack", "out",
                                    "adaptive", "resume", "overwrite"])
    for row in settings.SETTINGS:
        assert out.count(f"{row.help}{settings.default_text(row)}\n") == 1


def test_the_defaults_in_the_help():
    """One if points and images agree or one alone has it, else both; none where it is nothing, false or without end."""
    text = {row.name: settings.default_text(row) for row in settings.SETTINGS}
    expected = {"schedule": " (cosine)", "t_min": " (0.001)", "stabiliser": " (0)", "width": " (128)",
                "epochs": " (points: 100, images: 500)", "lr": " (points: 0.001, images: 0.0002)", "image_size": "",
                "skip_corrupt": "", "minutes": "", "channel_mult": "", "ema": " (points: 0, images: 0.9999)",
                "warmup": " (1000)", "precision": " (points: fp32, images: auto)", "grid_every": " (10000)"}
    assert {name: text[name] for name in expected} == expected
    assert settings.default_text(settings.Setting("a", "", [1, 2], [3])) == " (points: 1 2, images: 3)"


def test_what_is_given_counts_for_its_kind_and_the_rest_are_its_defaults():
    points, images = train.parse(["--lr", "0.5"]), train.parse(["--data", "cifar10", "--ema", "0.5", "--compile"])
    for kind, args, given in ("points", points, {"lr": 0.5}), ("images", images, {"ema": 0.5, "compile": True}):
        for row in settings.SETTINGS:
            default = getattr(row, kind)
            assert getattr(args, row.name) == given.get(row.name, None if default is settings.ABSENT else default)
    assert train.parse(["--data", "cifar10", "--no-compile"]).compile is False


def test_settings_of_the_other_kind_are_refused(capsys):
    for row in settings.SETTINGS:
        value = {"preset": ["thesis"], "skip_corrupt": [], "compile": [], "flip": [],
                 "dropout": ["0.5"], "energy": [], "activation": ["silu"],
                 "labels": [], "stable_targets": [], "optimizer": ["muon"]}.get(row.name, ["8"])
        option = f"--{row.name.replace('_', '-')}"
        if row.points is settings.ABSENT:
            exits_with_2([option, *value], f"{option} is a setting of images, not of points", capsys)
        if row.images is settings.ABSENT:
            images = ["--data", "cifar10", option, *value]
            exits_with_2(images, f"{option} is a setting of points, not of images", capsys)
    exits_with_2(["--no-compile"], "--compile is a setting of images", capsys)
    exits_with_2(["--dropout", "0"], "--dropout is a setting of images", capsys)       # given, though it is 0


def test_a_config_has_the_settings_that_change_a_run():
    """Of points all; of images not how long it is trained, how often it is tested, where the data are."""
    points, = settings.configs(train.parse([]))
    assert points.keys() == {"data", "target", "loss", "seed", "schedule", "t_min", "t_density", "stabiliser", "epochs",
                             "batch_size", "lr", "width", "timesteps", "variance", "vlb_weight", "sigma", "energy",
                             "activation", "labels", "ema", "optimizer", "precision", "stable_targets"}
    images, = settings.configs(train.parse(["--data", "cifar10"]), shape=[3, 32, 32], flip=True, precision="bf16")
    assert images.keys() == {"data", "target", "loss", "seed", "schedule", "t_min", "t_density", "stabiliser",
                             "batch_size", "lr", "image_size", "skip_corrupt", "ema", "warmup", "clip_norm",
                             "shape", "flip", "precision", "channels", "channel_mult", "layers", "mid_blocks",
                             "attention", "skips", "dropout", "timesteps", "variance", "vlb_weight", "labels"}
    args = train.parse(["--data", "cifar10", "--epochs", "7", "--minutes", "3", "--test-every", "5"])
    longer, = settings.configs(args, shape=[3, 32, 32], flip=True, precision="bf16")
    assert longer == images and settings.kind(images) == "images" and settings.kind(points) == "points"
    assert settings.configs(train.parse(["--epochs", "7"])) == [points | {"epochs": 7}]
    old = {key: value for key, value in images.items() if key not in ("t_density", "ema", "dropout")}
    assert settings.completed(old) == images | {"ema": 0.9999, "dropout": 0.0}
    assert settings.completed(points | {"lr": 7}) == points | {"lr": 7}
    of_name = {"data", "target", "loss", "seed"}
    assert settings.alike(points) == {key: value for key, value in points.items() if key not in of_name}


def test_a_new_row_reaches_parser_config_resuming_and_stacks(momentum, tmp_path, capsys, monkeypatch):
    assert train.parse([]).first_moment == 0.9 and train.parse(["--first-moment", "0.5"]).first_moment == 0.5
    assert train.parse(["--data", "cifar10"]).first_moment is None
    exits_with_2(["--first-moment", "2"], r"argument --first-moment: must be in \[0, 1\], got 2", capsys)
    exits_with_2(["--data", "cifar10", "--first-moment", "0.5"], "--first-moment is a setting of points", capsys)
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    assert re.search(r"--first-moment FIRST_MOMENT\s+Adam's \(0.9\)", capsys.readouterr().out)
    fit = lambda *more: train.main([*FAST, "--out", str(tmp_path), *more])
    fit("--first-moment", "0.5")
    folder = tmp_path / "clusters-eps-mse-s0"
    assert run.load(folder)["config"]["first_moment"] == 0.5
    with pytest.raises(SystemExit, match=r"other settings \(--first-moment 0.5\)"):
        fit("--resume")
    fit("--resume", "--first-moment", "0.5")
    fit("--target", "v")
    with pytest.raises(SystemExit, match="differ in first_moment and cannot be one stack"):
        run.open([folder, tmp_path / "clusters-v-mse-s0"])
    assert len(run.stacks([run.open(path) for path in (folder, tmp_path / "clusters-v-mse-s0")], "cpu")) == 2
    with_it = settings.SETTINGS
    monkeypatch.setattr(settings, "SETTINGS", with_it[:-1])      # a checkpoint from before it
    fit("--target", "x")
    monkeypatch.setattr(settings, "SETTINGS", with_it)
    assert run.open(tmp_path / "clusters-x-mse-s0").config["first_moment"] == 0.9
    assert len(run.open([tmp_path / f"clusters-{target}-mse-s0" for target in ("x", "v")]).members) == 2


def test_choices_are_the_tables_themselves():
    """So that a new schedule, density or preset needs its row in them only."""
    choices = {row.name: row.argument.get("choices") for row in settings.SETTINGS}
    assert choices["schedule"] == (*ddpm.SCHEDULES, "learned") and choices["t_density"] is losses.T_DENSITIES
    assert choices["preset"] is unet.PRESETS


@pytest.mark.parametrize("kind, low, high, wrong, message", [
    (int, 1, math.inf, "1.5", "'1.5' is not a whole number"), (float, 0, math.inf, "x", "'x' is not a number"),
    (float, 0, math.inf, "nan", "must be finite and at least 0, got nan"),
    (float, 0, math.inf, "inf", "must be finite and at least 0, got inf"),
    (int, 2, 5, "6", r"must be in \[2, 5\], got 6"), (int, 2, 5, "1", r"must be in \[2, 5\], got 1")])
def test_numbers_are_in_their_range(kind, low, high, wrong, message):
    parse = settings.number(kind, low, high)
    with pytest.raises(settings.argparse.ArgumentTypeError, match=message):
        parse(wrong)
    assert parse("3") == 3 and isinstance(parse("3"), kind) and parse(str(low)) == low


@pytest.mark.parametrize("change, message", [
    ({"t_min": 0}, r"--t-min must be in \[1e-06, 0.49\] without --timesteps, got 0"),
    ({"variance": "log"}, "--variance log is of a discrete chain"),
    ({"timesteps": 9, "t_density": "adaptive"}, "adaptive is of continuous time - .* or take loss_aware"),
    ({"loss": "vlb"}, "loss vlb is of a discrete"),
    ({"target": "mu"}, "target mu is the mean of a step"), ({"timesteps": 9, "t_min": 0}, "cosine's is not"),
    ({"timesteps": 9, "t_density": "logsnr"}, "logsnr is of continuous time"),
    ({"timesteps": 9, "variance": "range"}, "which --loss mse does not do"),
    ({"timesteps": 9, "loss": "hybrid"}, "small is fixed"), ({"loss": "nelbo_stable", "target": "u"}, "has no weight")])
def test_a_config_whose_settings_do_not_go_together_is_one_sentence(change, message):
    """As a hand wrote it into a checkpoint; the command line refuses the same, with code 2."""
    config, = settings.configs(train.parse([]))
    found = settings.fault(config | change)
    assert found.startswith("was trained with settings that do not go together, ") and "\n" not in found
    assert re.search(message, found) and found.endswith(" - give another --ckpt")


@pytest.mark.parametrize("key, values", [
    ("timesteps", [1, 0, -9, 2.5, True, "9", [9], 10**5, math.inf]), ("variance", [None, "beta", 1, ["log"]]),
    ("vlb_weight", [-1, None, "1", math.nan, math.inf, 10**7])])
def test_nonsense_in_the_settings_of_a_chain_is_noticed(key, values):
    config, = settings.configs(train.parse(["--timesteps", "9", "--loss", "hybrid", "--variance", "log"]))
    for value in values:
        assert f"was trained with --{key.replace('_', '-')} " in settings.fault(config | {key: value}), value


@pytest.mark.parametrize("words", [
    "--timesteps 2", "--timesteps 9 --schedule ddpm --t-min 0", "--timesteps 9 --schedule linear",
    "--timesteps 9 --t-min 0.2", "--timesteps 9 --loss hybrid --variance direct --t-density loss_aware",
    "--timesteps 9 --loss mse nelbo vlb --variance large --target mu F", "--timesteps 9 --variance best",
    "--timesteps 9 --schedule ddpm --t-min 1e-9"])
def test_settings_of_a_chain_that_go_together(words):
    args = train.parse(words.split())
    assert [settings.fault(config) for config in settings.configs(args)] == len(args.loss) * len(args.target) * [None]
    zero = args.schedule in ("ddpm", "linear") and "--t-min" not in words
    assert args.t_min == (0.0 if zero else args.t_min) and (zero or args.t_min > 0 or "--t-min 0" in words)


def test_paths_are_checked_as_they_are_read(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for name in "new", "new/deeper", ".":
        assert settings.folder(f"{tmp_path}/{name}") == f"{tmp_path}/{name}"
    for name in "new", "file":
        assert settings.file(f"{tmp_path}/{name}") == f"{tmp_path}/{name}"
    for parse, text, message in [
            (settings.folder, "", "is empty"), (settings.folder, f"{tmp_path}/file", "is a file, not a folder"),
            (settings.folder, f"{tmp_path}/file/new", "Not a directory"), (settings.folder, "a" * 300, "name too long"),
            (settings.folder, f"{tmp_path}/loop", "can be no path"), (settings.file, "", "is empty"),
            (settings.file, str(tmp_path), "is not a file"), (settings.file, f"{tmp_path}/file/new", "not a folder"),
            (settings.folder, "x\0", "null")]:
        with pytest.raises(settings.argparse.ArgumentTypeError, match=message):
            parse(text)


def test_the_rows_can_be_printed(capsys):
    runpy.run_path(settings.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [row.name for row in settings.SETTINGS]
    of = {line.split()[0]: line.split()[1:] for line in lines}
    assert of["epochs"] == ["100", "500", "points"] and of["width"] == ["128", "points"]
    assert of["test_every"] == ["2000"]
    assert of["ema"] == ["0.0", "0.9999", "points,", "images"] and of["lr"] == ["0.001", "0.0002", "points,", "images"]
