"""A picture of a speech recogniser: the words it confuses, and the alignment of an utterance."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
AUDIBLE = 0.1  # tokens that are never as probable as this are not drawn
BLANK = 0


def draw(
    path: str | Path,
    pairs: Sequence[tuple[str, str]],
    log_mel: Tensor,
    seconds_per_mel_frame: float,
    posteriors: Tensor,
    seconds_per_frame: float,
    tokens: Sequence[str],
    words: Sequence[tuple[str, float, float]],
) -> bool:
    """Write a PNG. Without matplotlib: print a message and return False.

    Args:
        path: of the PNG.
        pairs: (reference, hypothesis) of utterances with a small vocabulary, for the confusion matrix.
        log_mel: `[T, n_mels]` on the CPU, the log-mel frames of one utterance.
        seconds_per_mel_frame: of log_mel.
        posteriors: `[T', V]` on the CPU, the probabilities of its tokens; token 0 is the CTC blank.
        seconds_per_frame: of posteriors.
        tokens: the names of the V tokens.
        words: (word, start, end) of the utterance, in seconds.

    Raises:
        ValueError: the pairs have no words.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed, so there is no picture")
        return False
    figure = plt.figure(figsize=(16, 7), layout="constrained")
    left, right = figure.add_gridspec(1, 2, width_ratios=(1, 1.2))
    _draw_confusions(left.subgridspec(1, 1).subplots(), confusions(pairs))

    grid = right.subgridspec(3, 1, height_ratios=(0.12, 1, 1))
    spans, mel, probabilities = grid.subplots(sharex=True)
    _draw_words(spans, words)
    seconds = len(log_mel) * seconds_per_mel_frame
    mel.imshow(
        log_mel.T.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, log_mel.shape[1]),
        cmap="magma",
    )
    mel.set(ylabel="mel band")
    _draw_posteriors(probabilities, posteriors, seconds_per_frame, tokens)
    for axis in (mel, probabilities):
        for _, start, end in words:
            axis.axvspan(start, end, fill=False, color="white", alpha=0.6, linewidth=0.8)
    probabilities.set(xlim=(0, seconds), xlabel="time, seconds")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def confusions(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[list[int]]]:
    """Words, and how often each (row) was recognised as each (column); the last ones: inserted, deleted."""
    import jiwer

    output = jiwer.process_words([said for said, _ in pairs], [heard for _, heard in pairs])
    counts = Counter()
    for said, heard, chunks in zip(output.references, output.hypotheses, output.alignments):
        for chunk in chunks:
            rows = said[chunk.ref_start_idx : chunk.ref_end_idx]
            columns = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
            rows, columns = rows or [None] * len(columns), columns or [None] * len(rows)
            counts.update(zip(rows, columns))
    found = {word for pair in counts for word in pair} - {None}
    if not found:
        raise ValueError("the pairs have no words")
    words = [digit for digit in DIGITS if digit in found] + sorted(found - set(DIGITS))
    places = (*words, None)
    return words, [[counts[said, heard] for heard in places] for said in places]


def _draw_confusions(axis, found: tuple[list[str], list[list[int]]]) -> None:
    words, counts = found
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                color = "white" if shares[y][x] > 0.5 else "black"
                axis.text(x, y, count, ha="center", va="center", color=color, fontsize=9)
    n = len(words)
    axis.set_xticks(range(n + 1), [*words, "deleted"], rotation=45, ha="right")
    axis.set_yticks(range(n + 1), [*words, "inserted"])
    for line in (axis.axhline, axis.axvline):
        line(n - 0.5, color="grey", linewidth=0.8)
    axis.set(xlabel="heard", ylabel="said", title="words said and heard (counts)")
    axis.figure.colorbar(image, ax=axis, shrink=0.8, label="share of the row")


def _draw_words(axis, words: Sequence[tuple[str, float, float]]) -> None:
    spans = [(start, end - start) for _, start, end in words]
    axis.broken_barh(spans, (0, 1), facecolor="lightgrey", edgecolor="black", linewidth=0.8)
    for word, start, end in words:
        axis.text((start + end) / 2, 0.5, word, ha="center", va="center", fontsize=9)
    axis.set(ylim=(0, 1), title="one utterance: words, log-mel frames, probabilities of the tokens")
    axis.axis("off")


def _draw_posteriors(
    axis, posteriors: Tensor, seconds_per_frame: float, tokens: Sequence[str]
) -> None:
    """A line for each token that is audible, in the order of their peaks; if none is, for all tokens."""
    peaks = posteriors.amax(dim=0).tolist()
    shown = [i for i, peak in enumerate(peaks) if i != BLANK and peak >= AUDIBLE]
    shown = shown or [i for i in range(len(peaks)) if i != BLANK]
    shown.sort(key=posteriors.argmax(dim=0).tolist().__getitem__)
    image = axis.imshow(
        posteriors[:, shown].T.numpy(),
        aspect="auto",
        interpolation="nearest",
        extent=(0, len(posteriors) * seconds_per_frame, len(shown) - 0.5, -0.5),
        cmap="viridis",
        vmin=0,
        vmax=1,
    )
    axis.set_yticks(range(len(shown)), [tokens[i] for i in shown])
    axis.set(ylabel="token")
    axis.figure.colorbar(image, ax=axis, label="probability")
