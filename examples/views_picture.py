"""The picture of `examples/novel_views.py`: what is given, what is right, and what was rendered."""

from pathlib import Path

from torch import Tensor

SCENES = 4  # at most


def draw(
    path: Path,
    inputs: Tensor,
    truth: Tensor,
    rendered: dict[str, Tensor],
    scores: dict[str, Tensor],
) -> None:
    """Write a PNG: a row for each scene. Without matplotlib: print a message.

    Args:
        path: of the PNG.
        inputs: the pictures given, `[B, n, 3, S, S]`.
        truth: views of the same scenes `[B, m, 3, S, S]`, of which the first is drawn.
        rendered: by name, the same views as a model renders them.
        scores: by name, the PSNR of each, `[B, m]`.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed, so there is no picture")
        return
    rows, n = min(SCENES, len(inputs)), inputs.shape[1]
    columns = n + 1 + len(rendered)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.7 * columns, 1.9 * rows), layout="constrained", squeeze=False
    )
    for scene, row in enumerate(axes):
        images = [(f"picture {i + 1}", inputs[scene, i]) for i in range(n)]
        images.append(("truth", truth[scene, 0]))
        for name, views in rendered.items():
            images.append((f"{name}\n{scores[name][scene, 0].item():.1f} dB", views[scene, 0]))
        for axis, (title, image) in zip(row, images):
            axis.imshow(image.movedim(0, -1).numpy(), vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture in {path}")
