"""The figures: one function a figure, written to a file. Never called from the training loop.

Each target has one colour everywhere (Okabe and Ito's, safe for colour-blind readers).
"""
import io

import matplotlib

import run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of backend

COLOURS = {"x": "#0072B2", "eps": "#D55E00", "v": "#009E73", "s": "#CC79A7", "u": "#E69F00"}


def scatter(panels, path, points=5000):
    """Points side by side on the same axes. panels: {title: (n, 2) tensor}, at most `points` of each are shown."""
    fig, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.5), sharex=True, sharey=True, squeeze=False)
    for ax, (title, x) in zip(axes[0], panels.items()):
        x = x[:points].cpu().numpy()
        ax.scatter(x[:, 0], x[:, 1], s=1, alpha=0.4, linewidths=0, color="#0072B2", rasterized=True)
        ax.set_title(title, fontsize=10)
        ax.set_aspect("equal")
        ax.set(xlim=(-3, 3), ylim=(-3, 3))
    fig.tight_layout()
    save(fig, path)


def loss_curve(history, config, path):
    """Train and test loss over epochs with the optimum as a dashed line. history: dicts of a run's metrics.jsonl."""
    fig, ax = plt.subplots(figsize=(5, 3.5))
    epochs, colour = [h["epoch"] for h in history], COLOURS.get(config["target"], "black")
    ax.plot(epochs, [h["train_loss"] for h in history], color=colour, alpha=0.4, label="train")
    ax.plot(epochs, [h["test_loss"] for h in history], color=colour, label="test")
    ax.axhline(history[-1]["optimum"], color="black", linestyle="--", linewidth=1, label="best possible")
    ax.set(xlabel="epoch", ylabel=f"{config['loss']} of {config['target']}",
           title=f"{config['data']}, {config['target']}, {config['loss']}, seed {config['seed']}")
    ax.legend()
    fig.tight_layout()
    save(fig, path)


def save(fig, path):
    """Write the figure as PNG, whole or not at all, and close it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=120)
    plt.close(fig)
    run.write(path, buffer.getbuffer())
