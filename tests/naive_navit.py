"""The model for one image, from its weights, in plain loops: nothing of the package runs here."""

import math

import torch
from torch.nn import functional as F


def forward(model, image, path=None):
    """Return the output of one image: {"patches": [n, D], "coords": [n, 2], "grid_hw": (h, w)}.

    path[block] is what its attention and its MLP are multiplied by.
    """
    config, weights = model.config, dict(model.named_parameters())
    x = linear(weights, "embed", image["patches"].to(weights["embed.weight"].dtype) / 127.5 - 1)
    inputs = []
    for patch, (y, column) in zip(x, image["coords"], strict=True):
        if y < 0:
            inputs.append(weights["prefix"][column])
        else:
            place = position(config, weights, y, column, image["grid_hw"])
            inputs.append(patch if place is None else patch + place)
    x = torch.stack(inputs)
    if config.norm_embed:
        x = layer_norm(config, weights, "norm_embed", x)
    for number in range(config.depth):
        own = {
            name.removeprefix(f"blocks.{number}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{number}.")
        }
        a, b = (1, 1) if path is None else path[number]
        scale = own.get("scale_attention.weight", 1), own.get("scale_mlp.weight", 1)
        normed = layer_norm(config, own, "norm_attention", x)
        x = x + a * attended(config, own, normed, image) * scale[0]
        normed = layer_norm(config, own, "norm_mlp", x)
        x = x + b * mlp(config, own, normed, gated=config.gated) * scale[1]
    if not config.norm_pooled:
        x = layer_norm(config, weights, "norm", x)
    body = x[config.prefix_tokens :]
    pooled = {
        "attention": lambda: attention_pool(config, weights, body),
        "mean": lambda: body.sum(0) / len(body),
        "max": lambda: body.max(0).values,
        "first": lambda: x[0],
        "none": lambda: x,
    }[config.pooling]()
    if config.norm_pooled:
        pooled = layer_norm(config, weights, "norm", pooled)
    if "head.weight" in weights:
        pooled = linear(weights, "head", pooled)
    if config.head == "unit":
        pooled = pooled / (pooled**2).sum(-1, keepdim=True).sqrt()
    return pooled


def attended(config, weights, x, image):
    places = [turn(config, place, image["grid_hw"]) for place in image["coords"]]
    size = config.dim // config.heads
    parts = x @ weights["queries_keys_values.weight"].T
    heads = []
    for head in range(config.heads):
        cut = [parts[:, part * config.dim + head * size :][:, :size] for part in range(3)]
        q, k, v = cut
        if config.bias:
            q = q + weights["bias_queries_values"][0, head]
            v = v + weights["bias_queries_values"][1, head]
        if config.qk_norm:
            q = rms_norm(q, weights["norm_queries.weight"])
            k = rms_norm(k, weights["norm_keys.weight"])
        if config.position.startswith("rotary"):
            q = torch.stack([turned(t, place) for t, place in zip(q, places, strict=True)])
            k = torch.stack([turned(t, place) for t, place in zip(k, places, strict=True)])
        heads.append((q @ k.T / math.sqrt(size)).softmax(-1) @ v)
    return linear(weights, "project", torch.cat(heads, -1))


def turn(config, place, grid_hw):
    """Return what of y and of x a token turns by; prefix tokens do not turn."""
    if place[0] < 0:
        return (0, 0)
    if config.position == "rotary":
        return place
    middles = [2 * (index + 0.5) / size - 1 for index, size in zip(place, grid_hw, strict=True)]
    return [2 * math.pi * middle for middle in middles]


def turned(vector, place):
    """Channel i and channel i + E/2 turn by an angle: of y for the first E/4, of x for the rest."""
    size = len(vector)
    out = list(vector)
    for i in range(size // 2):
        axis, power = divmod(i, size // 4)
        angle = place[axis] * 100.0 ** (-power / (size // 4))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = vector[i] * cos - vector[i + size // 2] * sin
        out[i + size // 2] = vector[i] * sin + vector[i + size // 2] * cos
    return torch.stack(out)


def attention_pool(config, weights, x):
    size = config.dim // config.heads
    parts = x @ weights["pool.keys_values.weight"].T
    heads = []
    for head in range(config.heads):
        k = parts[:, head * size :][:, :size]
        if config.qk_norm:
            k = rms_norm(k, weights["pool.norm_keys.weight"])
        v = parts[:, config.dim + head * size :][:, :size]
        if config.bias:
            v = v + weights["pool.bias_values"][head]
        heads.append((k @ weights["pool.query"][head]).softmax(0) @ v)
    own = {name.removeprefix("pool."): value for name, value in weights.items()}
    out = linear(own, "project", torch.cat(heads))
    out = out + mlp(config, own, layer_norm(config, own, "norm_mlp", out))
    return layer_norm(config, own, "norm_out", out) if config.norm_out else out


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def mlp(config, weights, x, gated=False):
    wide = linear(weights, "widen", x)
    up = 1
    if gated:
        half = wide.shape[-1] // 2
        wide, up = wide[..., :half], wide[..., half:]
    share = {
        "gelu": lambda: (1 + torch.erf(wide / math.sqrt(2))) / 2,
        "gelu_tanh": lambda: (
            (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))) / 2
        ),
        "quick_gelu": lambda: 1 / (1 + torch.exp(-1.702 * wide)),
        "silu": lambda: 1 / (1 + torch.exp(-wide)),
    }[config.activation]()
    return linear(weights, "narrow", wide * share * up)


def layer_norm(config, weights, name, x):
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / ((centred**2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return unit * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)


def rms_norm(x, weight):
    return x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def position(config, weights, y, x, grid_hw):
    """Return the vector of a patch, or None."""
    kind, (h, w) = config.position, grid_hw
    side = config.side
    fy, fx = (y / (h - 1) if h > 1 else 0.0), (x / (w - 1) if w > 1 else 0.0)
    if kind in ("none", "rotary", "rotary_fractional"):
        return None
    if kind.startswith("factorised"):
        rows, columns = weights["position.rows"], weights["position.columns"]
        if "fractional" in kind:
            a, b = between(rows, fy * (side - 1)), between(columns, fx * (side - 1))
        else:
            a, b = rows[y], columns[x]
        if kind.endswith("sum"):
            return a + b
        return a * b if kind.endswith("product") else torch.cat([a, b])
    if kind.startswith("fourier"):
        v = (fy, fx) if "fractional" in kind else (y, x)
        angles = [v[0] * f[0] + v[1] * f[1] for f in weights["position.frequencies"].T]
        return torch.stack([*(a.sin() for a in angles), *(a.cos() for a in angles)])
    if kind.startswith("sinusoidal"):
        v = (fy * (side - 1), fx * (side - 1)) if "fractional" in kind else (y, x)
        quarter = config.dim // 4
        waves = []
        for value in v:
            angles = [value * 10_000 ** (-i / quarter) for i in range(quarter)]
            waves += [*map(math.sin, angles), *map(math.cos, angles)]
        return torch.tensor(waves, dtype=weights["embed.weight"].dtype)
    table = weights["position.table"]
    if kind == "resized":
        size = (max(h, w), max(h, w)) if config.keep_aspect else (h, w)
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        antialias = {"antialias": config.antialias}
        return F.interpolate(square, size, mode=config.resize, **antialias)[0, :, y, x]
    if kind == "learned_1d":
        flat, last = y * w + x, h * w - 1
        return between(table, (flat / last if last else 0.0) * (len(table) - 1))
    if kind == "learned_2d":
        return table[y * side + x]
    rows = table.reshape(side, side, -1)
    return between(torch.stack([between(row, fx * (side - 1)) for row in rows]), fy * (side - 1))


def between(table, place):
    low = min(math.floor(place), max(len(table) - 2, 0))
    high = min(low + 1, len(table) - 1)
    return table[low] * (1 - (place - low)) + table[high] * (place - low)
