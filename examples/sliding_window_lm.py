"""Run a sliding-window language model of `transformers` on `window_attn`, by setting one string.

```
python -m examples.sliding_window_lm
```

A small Mistral with a window of 64 bytes is made from a configuration (nothing is downloaded), compared with
transformers' own attention, trained on this repository's README for some steps, and used to generate from a
batch of prompts of different lengths. About 20 seconds on two cores; needs transformers. Exit status: 0 if
both attentions agree and the loss falls.
"""

import sys
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

import lact_kernels.compat.transformers  # noqa: F401  registers "lact_window_attn"

TEXT = Path(__file__).parent.parent / "README.md"
WINDOW, T, STEPS, BATCH = 64, 256, 100, 8


def main() -> int:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = MistralForCausalLM(config)
    data = torch.tensor(list(TEXT.read_bytes()))

    logits = {}
    for attention in ("eager", "lact_window_attn"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits[attention] = model(data[None, :T]).logits
    error = (logits["eager"] - logits["lact_window_attn"]).abs().max().item()
    print(f"window of {WINDOW}, {T} tokens: logits differ from eager attention by {error:.1e}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(STEPS):
        starts = torch.randint(len(data) - T, (BATCH,))
        batch = torch.stack([data[i : i + T] for i in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == STEPS - 1:
            print(f"  step {step:3d}  loss {loss.item():.3f}", flush=True)

    prompts = [b"`window_attn` is ", b"The "]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    out = model.eval().generate(
        ids, attention_mask=(ids > 0).long(), max_new_tokens=100, do_sample=False
    )
    for row in out:
        print("  " + repr(bytes(row[row > 0].tolist()).decode(errors="replace")))
    return 0 if error < 1e-4 and losses[-1] < losses[0] - 1 else 1


if __name__ == "__main__":
    sys.exit(main())
