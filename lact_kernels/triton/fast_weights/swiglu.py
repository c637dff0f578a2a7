"""What lies between the products, one hidden unit of one token at a time (see `activations`).

The functions take tensors or single numbers. Where the compiler can, they are applied number by number: that
takes fewer registers than one operation after another on whole blocks.
"""

import triton
import triton.language as tl
from triton import knobs

# Triton has it since 3.5, its interpreter has not.
ONE_BY_ONE = tl.constexpr(hasattr(tl, "map_elementwise") and not knobs.runtime.interpret)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _hidden(gate, up):
    return gate * _sigmoid(gate) * up


@triton.jit
def _gradients(gate, up, dhidden, lr0, lr2):
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    # up silu'(gate) is up sigmoid + hidden (1 - sigmoid).
    dgate = dhidden * lr0 * (up * sigmoid + hidden * (1 - sigmoid))
    return dgate, hidden, dhidden * lr2 * silu


@triton.jit
def _gradients_bwd(gate, up, dhidden, dgate_k, dup_k, hidden_v, lr0, lr1, lr2, rate0, rate1, rate2):
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid * (1 + gate * (1 - sigmoid))  # silu'
    bend = sigmoid * (1 - sigmoid) * (2 + gate * (1 - 2 * sigmoid))  # silu''
    hidden = silu * up
    dup = dhidden * silu
    dgate = dhidden * up * slope
    dlr0, dlr1, dlr2 = dgate_k * dgate, hidden_v * hidden, dup_k * dup
    dgate_k *= rate0
    hidden_v *= rate1
    dup_k *= rate2
    through_gate = dgate_k * dhidden * up * bend + (dup_k * dhidden + hidden_v * up) * slope
    through_dhidden = dup_k * silu + dgate_k * up * slope
    through_up = dgate_k * dhidden * slope + hidden_v * silu
    return (
        lr0 * dgate, hidden, lr2 * dup, dlr0, dlr1, dlr2, through_gate, through_dhidden, through_up,
    )  # fmt: skip


@triton.jit
def hidden(gate, up):
    """What w1 is applied to."""
    if ONE_BY_ONE:
        result = tl.map_elementwise(_hidden, gate, up)
    else:
        result = _hidden(gate, up)
    return result


@triton.jit
def gradients(gate, up, dhidden, lr0, lr2):
    """lr0 dgate, hidden and lr2 dup; the rates are one number for each token, `[tokens, 1]`."""
    if ONE_BY_ONE:
        results = tl.map_elementwise(_gradients, gate, up, dhidden, lr0, lr2)
    else:
        results = _gradients(gate, up, dhidden, lr0, lr2)
    return results


@triton.jit
def gradients_bwd(activations, products, rates, unit_rates):
    """Those three again, the terms of dlr0, dlr1 and dlr2, and what reaches gate, dhidden and up.

    From gate, up and dhidden; dgate_x, dup_x and hidden_y; and three rates twice: the second ones are for
    what is passed on, in its unit.
    """
    gate, up, dhidden = activations
    dgate_k, dup_k, hidden_v = products
    lr0, lr1, lr2 = rates
    rate0, rate1, rate2 = unit_rates
    if ONE_BY_ONE:
        results = tl.map_elementwise(
            _gradients_bwd, gate, up, dhidden, dgate_k, dup_k, hidden_v,
            lr0, lr1, lr2, rate0, rate1, rate2,
        )  # fmt: skip
    else:
        results = _gradients_bwd(
            gate, up, dhidden, dgate_k, dup_k, hidden_v, lr0, lr1, lr2, rate0, rate1, rate2
        )
    return results
