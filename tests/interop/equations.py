"""Published decoders in NumPy and float64, token by token, from the tensors of their files.

Nothing of delta_jax's layers is used. A tensor that is asked for and not there is made up, random, so that one run of a
decoder both says what a checkpoint of it holds and what it computes.
"""

import numpy as np


class Tensors:
    """Tensors by name, float32 as in a file; those made up are random, norms around one."""

    def __init__(self, there=None):
        self.there = dict(there or {})
        self._made_up = there is None
        self._random = np.random.default_rng(0)

    def __call__(self, name, *shape):
        if self._made_up and name not in self.there:
            scales = {"norm": 0.3, "A_log": 0.5, "bias": 0.4, "conv": 0.5, "embed": 1.0}
            scale = next((value for key, value in scales.items() if key in name), 0.3)
            numbers = scale * self._random.standard_normal(shape) + ("norm" in name)
            self.there[name] = numbers.astype(np.float32)
        assert self.there[name].shape == shape, (name, self.there[name].shape, shape)
        return self.there[name].astype(np.float64)

    def under(self, prefix):
        return lambda name, *shape: self(prefix + name, *shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def convolved(x, kernel, bias=0.0):
    """Causal, a kernel [channels, 1, taps] whose last tap is the token's own, then SiLU."""
    taps = kernel.shape[2]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    return silu(sum(padded[tap : tap + len(x)] * kernel[:, 0, tap] for tap in range(taps)) + bias)


def attention(x, get, *, heads, kv_heads, size, theta, eps=None, window=None, qkv_bias=False, o_bias=False):
    time, width = x.shape
    counts = {"q": heads, "k": kv_heads, "v": kv_heads}
    q, k, v = (x @ get(f"{n}_proj.weight", c * size, width).T for n, c in counts.items())
    if qkv_bias:
        q, k, v = (y + get(f"{n}_proj.bias", c * size) for y, (n, c) in zip((q, k, v), counts.items(), strict=True))
    q, k, v = (y.reshape(time, -1, size) for y in (q, k, v))
    if eps is not None:
        q, k = rms(q, get("q_norm.weight", size), eps), rms(k, get("k_norm.weight", size), eps)
    angles = np.arange(time)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    cos, sin = np.tile(np.cos(angles), 2)[:, None], np.tile(np.sin(angles), 2)[:, None]

    def turned(y):
        return y * cos + np.concatenate([-y[..., size // 2 :], y[..., : size // 2]], -1) * sin

    k, v = np.repeat(turned(k), heads // kv_heads, 1), np.repeat(v, heads // kv_heads, 1)
    scores = np.einsum("thd,shd->hts", turned(q), k) / np.sqrt(size)
    distance = np.arange(time)[:, None] - np.arange(time)
    seen = (distance >= 0) & (distance < (window or time))
    weights = np.exp(np.where(seen, scores, -np.inf) - scores.max(-1, keepdims=True))
    y = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v).reshape(time, -1)
    return y @ get("o_proj.weight", width, heads * size).T + (get("o_proj.bias", width) if o_bias else 0)


def delta_rule(q, k, v, g, beta):
    """[time, heads, size] each, g a channel, beta [time, heads]; queries and keys are made of length one."""
    q, k = (y / np.sqrt(np.sum(y**2, -1, keepdims=True) + 1e-6) for y in (q, k))
    state, outputs = np.zeros((*q.shape[1:], v.shape[2])), []
    for t in range(len(q)):
        state = np.exp(g[t])[..., None] * state
        error = v[t] - np.einsum("hk,hkv->hv", k[t], state)
        state = state + np.einsum("h,hk,hv->hkv", beta[t], k[t], error)
        outputs.append(np.einsum("hk,hkv->hv", q[t], state) / np.sqrt(q.shape[2]))
    return np.stack(outputs)


def gated_delta_net(q, k, v, a, b, z, get, *, heads, eps, norm):
    """From queries, keys and values after their convolution, [time, some heads, size], which are repeated to all heads."""
    q, k, v = (np.repeat(y, heads // y.shape[1], 1) for y in (q, k, v))
    g = -np.exp(get("A_log", heads)) * np.log1p(np.exp(a + get("dt_bias", heads)))
    y = delta_rule(q, k, v, np.repeat(g[..., None], q.shape[2], -1), b)
    y = rms(y, get(f"{norm}.weight", v.shape[2]), eps)
    return (y * silu(z.reshape(y.shape))).reshape(len(y), -1) if z is not None else y.reshape(len(y), -1)


def kimi_delta_attention(x, get, *, heads, size, eps, gate, names, convs="{}_conv", norm="norm", taps=4, bias=None):
    """`names` are those of beta's and of the four low-rank projections, decay first."""
    time, width = x.shape
    whole = heads * size
    q, k, v = (
        convolved(
            x @ get(f"{n}_proj.weight", whole, width).T, get(f"{convs.format(n)}.weight", whole, 1, taps)
        ).reshape(time, heads, size)
        for n in "qkv"
    )
    beta, f_down, f_up, g_down, g_up = names
    f = x @ get(f"{f_down}.weight", size, width).T @ get(f"{f_up}.weight", whole, size).T + get("dt_bias", whole)
    g = -np.exp(get("A_log", heads))[:, None] * np.log1p(np.exp(f)).reshape(time, heads, size)
    y = delta_rule(q, k, v, g, sigmoid(x @ get(f"{beta}.weight", heads, width).T))
    z = x @ get(f"{g_down}.weight", size, width).T @ get(f"{g_up}.weight", whole, size).T
    z = gate((z if bias is None else z + get(bias, whole)).reshape(y.shape))
    y = (rms(y, get(f"{norm}.weight", size), eps) * z).reshape(time, whole)
    return y @ get("o_proj.weight", width, whole).T


def separate_gated_delta_net(x, get, *, heads, kv_heads, size, v_size, eps, a="a", taps=4, bias=False, negative=False):
    """Gated DeltaNet with a matrix for each of its inputs; flash-linear-attention's, and the primed one's."""
    time, width = x.shape
    sizes = {"q": (heads, size), "k": (kv_heads, size), "v": (kv_heads, v_size)}
    q, k, v = (
        convolved(
            x @ get(f"{n}_proj.weight", h * d, width).T,
            get(f"{n}_conv1d.weight", h * d, 1, taps),
            get(f"{n}_conv1d.bias", h * d) if bias else 0.0,
        ).reshape(time, h, d)
        for n, (h, d) in sizes.items()
    )
    b = (1 + negative) * sigmoid(x @ get("b_proj.weight", heads, width).T)
    a, z = x @ get(f"{a}_proj.weight", heads, width).T, x @ get("g_proj.weight", heads * v_size, width).T
    y = gated_delta_net(q, k, v, a, b, z, get, heads=heads, eps=eps, norm="o_norm")
    return y @ get("o_proj.weight", width, heads * v_size).T


def joined_gated_delta_net(x, get, *, key_heads, heads, size, v_size, eps, taps):
    """Gated DeltaNet of Fast-LLM: all its inputs in two matrices, one part after another."""
    time, width = x.shape
    keys, values = key_heads * size, heads * v_size
    parts = [keys, 2 * keys, 2 * keys + values]
    mixed, z = np.split(x @ get("in_proj_qkvz.weight", 2 * keys + 2 * values, width).T, parts[2:], -1)
    b, a = np.split(x @ get("in_proj_ba.weight", 2 * heads, width).T, 2, -1)
    q, k, v = np.split(convolved(mixed, get("convolution.weight", parts[2], 1, taps)), parts[:2], -1)
    q, k, v = q.reshape(time, -1, size), k.reshape(time, -1, size), v.reshape(time, -1, v_size)
    y = gated_delta_net(q, k, v, a, sigmoid(b), z, get, heads=heads, eps=eps, norm="norm")
    return y @ get("out_proj.weight", width, values).T


def decoder(
    tokens,
    get,
    mixers,
    *,
    vocabulary,
    width,
    inner,
    eps,
    tied=False,
    embedding="embed_tokens",
    norms=("input_layernorm", "post_attention_layernorm"),
    layers="layers",
):
    """Logits [time, vocabulary]; `mixers` are a function of x each."""
    table = get(f"model.{embedding}.weight", vocabulary, width)
    x = table[tokens]
    for number, mixer in enumerate(mixers):
        here = f"model.{layers}.{number}."
        x = x + mixer(rms(x, get(f"{here}{norms[0]}.weight", width), eps))
        read = rms(x, get(f"{here}{norms[1]}.weight", width), eps)
        gate, up = (read @ get(f"{here}mlp.{n}_proj.weight", inner, width).T for n in ("gate", "up"))
        x = x + (silu(gate) * up) @ get(f"{here}mlp.down_proj.weight", width, inner).T
    x = rms(x, get("model.norm.weight", width), eps)
    return x @ (table if tied else get("lm_head.weight", vocabulary, width)).T
