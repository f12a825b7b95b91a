"""Rotations of the weights that leave the function of a Qwen2-like decoder as it is, to rounding.

A state is {tensor name: tensor} of one model with the names of transformers (model.layers.<i>.self_attn.q_proj.weight
and so on; weights (out, in), RMSNorm, SwiGLU, rotary embeddings over halves of a head). Every function gives a new
state in the dtype of the old one. Sizes are told by the shapes, but for the width of a head. Weights that differ by a
gauge compute the same: a distance between weights that a gauge changes says nothing about the models.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from rotrl.linalg.procrustes import polar

State = dict[str, Tensor]


def head_rotation(state: State, layer: int, group: int, R: Tensor) -> State:
    """Values of one KV group turned by R in O(head_dim): v -> R v, undone in the columns of o of the group's heads.

    R (head_dim, head_dim). The bias of v turns too.
    """
    width, at = len(R), _attention(layer)
    heads = _groups(state, layer, width)
    rows = slice(group * width, (group + 1) * width)
    state = _rows(state, f"{at}.v_proj", rows, R)
    o = state[f"{at}.o_proj.weight"].clone()
    for head in range(group * heads, (group + 1) * heads):
        columns = slice(head * width, (head + 1) * width)
        o[:, columns] = o[:, columns] @ R.T.to(o)
    return state | {f"{at}.o_proj.weight": o}


def rope_rotation(state: State, layer: int, group: int, angles: Tensor) -> State:
    """Queries and keys of one KV group turned by `angles` (head_dim / 2,) in the planes (i, i + head_dim / 2) of RoPE.

    These rotations commute with RoPE's own and leave q^T k alone. Biases of q and k turn too.
    """
    c, s = torch.diag(angles.double().cos()), torch.diag(angles.double().sin())
    return query_key_rotation(state, layer, group, torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)]))


def query_key_rotation(state: State, layer: int, group: int, R: Tensor) -> State:
    """Queries and keys of one KV group turned by any R in O(head_dim). Under RoPE this is NO gauge: see rope_rotation.

    It is one without position embeddings, and serves as the control that must change the function.
    """
    width, at = len(R), _attention(layer)
    heads = _groups(state, layer, width)
    state = _rows(state, f"{at}.k_proj", slice(group * width, (group + 1) * width), R)
    for head in range(group * heads, (group + 1) * heads):
        state = _rows(state, f"{at}.q_proj", slice(head * width, (head + 1) * width), R)
    return state


def fold_norms(state: State) -> State:
    """Gains of every RMSNorm moved into the matrices that read it (q, k, v; gate, up; head), and set to 1.

    With a tied head the embedding can't take the final gain: the state gets a lm_head.weight of its own, and the model
    has to be untied.
    """
    new = dict(state)
    for layer in range(_layers(state)):
        at = f"model.layers.{layer}"
        _fold(new, f"{at}.input_layernorm.weight", [f"{at}.self_attn.{x}_proj.weight" for x in "qkv"])
        _fold(new, f"{at}.post_attention_layernorm.weight", [f"{at}.mlp.{x}_proj.weight" for x in ("gate", "up")])
    new.setdefault("lm_head.weight", new["model.embed_tokens.weight"])
    _fold(new, "model.norm.weight", ["lm_head.weight"])
    return new


def residual_rotation(state: State, R: Tensor) -> State:
    """The residual stream turned by R in O(hidden): what writes to it by R from the left, what reads it by R^T.

    Exact only after fold_norms: a gain does not commute with R.
    """
    new = dict(state)
    for name, W in state.items():
        if re.search(r"\.(q|k|v|gate|up)_proj\.weight$|^lm_head\.weight$|embed_tokens\.weight$", name):
            new[name] = W @ R.T.to(W)
        elif re.search(r"\.(o|down)_proj\.(weight|bias)$", name):
            new[name] = R.to(W) @ W
    return new


def neurons(state: State, layer: int, order: Sequence[int] | Tensor, scale: Tensor) -> State:
    """Neurons of the MLP in another order, up scaled against down: up_i -> scale_i up_i, down_i -> down_i / scale_i.

    order (intermediate,) a permutation, scale (intermediate,) without zeros, by the new order. The gate, which passes a
    nonlinearity, can only be permuted.
    """
    at, order = f"model.layers.{layer}.mlp", torch.as_tensor(order)
    gate, up, down = (state[f"{at}.{x}_proj.weight"] for x in ("gate", "up", "down"))
    scale = scale.to(up)
    return state | {
        f"{at}.gate_proj.weight": gate[order],
        f"{at}.up_proj.weight": scale[:, None] * up[order],
        f"{at}.down_proj.weight": down[:, order] / scale,
    }


def nearest_gauge(state: State, target: State, layer: int, width: int) -> State:
    """The layer in the gauge nearest to that of `target`: rotations of values, RoPE planes, order and scale of neurons.

    Values of a KV group: `R = polar(V0 V^T + sum_h O0_h^T O_h)`, which minimises `|R V - V0|^2 + |O R^T - O0|^2`. A
    plane of RoPE: the angle that minimises the distance of queries and keys. Neurons: the assignment of greatest
    cosines, then `scale = sqrt(|up0| |down| / (|up| |down0|))`. `width` is that of a head; biases count and turn too.
    """
    for group in range(len(state[f"{_attention(layer)}.k_proj.weight"]) // width):
        state = head_rotation(state, layer, group, _nearest_values(state, target, layer, group, width))
        state = rope_rotation(state, layer, group, _nearest_planes(state, target, layer, group, width))
    return neurons(state, layer, *_nearest_neurons(state, target, layer))


def _nearest_values(state: State, target: State, layer: int, group: int, width: int) -> Tensor:
    heads, at = _groups(state, layer, width), _attention(layer)
    rows = slice(group * width, (group + 1) * width)
    overlap = _with_bias(target, f"{at}.v_proj", rows) @ _with_bias(state, f"{at}.v_proj", rows).T
    for head in range(group * heads, (group + 1) * heads):
        columns = slice(head * width, (head + 1) * width)
        o0, o = (each[f"{at}.o_proj.weight"][:, columns].double() for each in (target, state))
        overlap += o0.T @ o
    return polar(overlap)


def _nearest_planes(state: State, target: State, layer: int, group: int, width: int) -> Tensor:
    heads, at = _groups(state, layer, width), _attention(layer)
    rows = [(f"{at}.k_proj", group)] + [(f"{at}.q_proj", h) for h in range(group * heads, (group + 1) * heads)]
    cosine = sine = torch.zeros(width // 2, dtype=torch.float64)
    for module, head in rows:
        part = slice(head * width, (head + 1) * width)
        (x1, x2), (y1, y2) = (_with_bias(each, module, part).chunk(2) for each in (state, target))
        cosine = cosine + (x1 * y1 + x2 * y2).sum(1)
        sine = sine + (x1 * y2 - x2 * y1).sum(1)
    return torch.atan2(sine, cosine)


def _nearest_neurons(state: State, target: State, layer: int) -> tuple[Tensor, Tensor]:
    """(order, scale) of the neurons, as `neurons` takes them."""
    from scipy.optimize import linear_sum_assignment

    gate, up, down = (_neuron_rows(state, layer, x) for x in ("gate", "up", "down"))
    gate0, up0, down0 = (_neuron_rows(target, layer, x) for x in ("gate", "up", "down"))
    cosines = _cosines(gate0, gate) + (_cosines(up0, up) + _cosines(down0, down)).abs() / 2  # up and down share a sign
    order = cosines.argmax(1)
    if len(order.unique()) < len(order):  # where every neuron's best partner is its own, that is the assignment
        order = torch.as_tensor(linear_sum_assignment(cosines.numpy(), maximize=True)[1])
    up, down = up[order], down[order]
    up_norm, down_norm, up0_norm, down0_norm = (rows.double().norm(dim=1) for rows in (up, down, up0, down0))
    size = ((up0_norm * down_norm) / (up_norm * down0_norm)).sqrt()
    size = torch.where(size.isfinite() & (size > 0), size, 1.0)
    against = (up0 * up).sum(1) / (up_norm * up0_norm) + (down0 * down).sum(1) / (down_norm * down0_norm) < 0
    return order, torch.where(against, -size, size)


def _neuron_rows(state: State, layer: int, module: str) -> Tensor:
    weight = state[f"model.layers.{layer}.mlp.{module}_proj.weight"]
    return weight.T.contiguous() if module == "down" else weight


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T


def _with_bias(state: State, module: str, rows: slice) -> Tensor:
    """Rows of a weight in float64, the bias as one more column where there is one."""
    parts = [state[f"{module}.weight"][rows].double()]
    if f"{module}.bias" in state:
        parts.append(state[f"{module}.bias"][rows, None].double())
    return torch.cat(parts, 1)


def _attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def _layers(state: State) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(r"model\.layers\.(\d+)\.", name)))


def _groups(state: State, layer: int, width: int) -> int:
    """Query heads of a KV group."""
    q, k = (state[f"{_attention(layer)}.{x}_proj.weight"] for x in "qk")
    if len(q) % width or len(k) % width:
        raise ValueError(f"layer {layer}: {len(q)} and {len(k)} rows of q and k are no multiples of {width} (head_dim)")
    return len(q) // len(k)


def _rows(state: State, module: str, rows: slice, R: Tensor) -> State:
    new = dict(state)
    for name in (f"{module}.weight", f"{module}.bias"):
        if name in state:
            new[name] = state[name].clone()
            new[name][rows] = R.to(new[name]) @ new[name][rows]
    return new


def _fold(state: State, norm: str, readers: Sequence[str]) -> None:
    for reader in readers:
        state[reader] = state[reader] * state[norm].to(state[reader])
    state[norm] = torch.ones_like(state[norm])
