"""The figure of the theorem on doubling the steps of a chain.

Not here: all other figures (`plots.py`, which says what they have in common).
"""
import torch
from matplotlib import pyplot as plt

from plots import save
from plots_weightings import SCHEDULE_COLOURS


def doubling(panels, path):
    """|L_T - L_2T| over T, both axes logarithmic; dashed and open where L_2T is the larger.

    panels: {title: {(schedule, what the denoiser is): (T (n,), L_T - L_2T (n,))}}; a denoiser has its marker.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.9), sharex=True, sharey=True, squeeze=False)
    markers = dict(zip(dict.fromkeys(denoiser for curves in panels.values() for _, denoiser in curves), "os^v"))
    for ax, (title, curves) in zip(axes[0], panels.items()):
        for (schedule, denoiser), (T, change) in curves.items():
            for grows in False, True:
                shown = torch.where((change < 0) == grows, change.abs(), torch.nan)
                ax.plot(T, shown, "--" if grows else "-", marker=markers[denoiser], markersize=5, linewidth=1.3,
                        color=SCHEDULE_COLOURS.get(schedule, "#CC6677"), markerfacecolor="white" if grows else None,
                        label=None if grows else f"{schedule}, {denoiser}")
        ax.set(xscale="log", yscale="log", xlabel="T", title=title)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("|L_T - L_2T|, nats")
    axes[0, 0].legend(fontsize=8, title="open, dashed: L_2T is larger", title_fontsize=8)
    fig.tight_layout()
    save(fig, path)
