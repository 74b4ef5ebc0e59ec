"""Random small models and random configurations of a run, as values that hypothesis draws and shrinks.

model      := (kind, width, steps, tied)         kind := text | vectors | image; what the steps start from
steps      := step*
step, of a sequence:
    linear OUT bias|none|conv1d | act NAME | dropout SHARE | norm layer|rms|batch | mlp HIDDEN ACT plain|gated|fused|glu
    attention HEADS KV_HEADS HEAD_DIM FUSED plain|explicit|matmul|gqa CAUSAL | time_conv OUT KERNEL GROUPS
    residual STEPS SCALED      x + steps(x); the steps end at the width that they began with
    cat [STEPS, STEPS]         both beside each other
    split STEPS cat|add|mul    the first half through the steps
    regroup PARTS OUT INSIDE   view(PARTS, -1), one layer for every part, flat again
    again I                    step I of this chain, once more
step, of an image:
    conv OUT KERNEL STRIDE GROUPS BIAS | act | image_norm batch|group GROUPS | pool max|mean | squeeze HIDDEN
    shuffle GROUPS | residual | cat | split | product | slice | tokens (from there on it is a sequence)
"""

from __future__ import annotations

from hypothesis import strategies as st

WIDTHS = (4, 6, 8, 12)
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "relu2")
SEQUENCE = ("mlp", "linear", "attention", "norm", "act", "residual", "cat", "split", "product", "regroup", "slice")
SEQUENCE += ("mixer", "time_conv", "dropout")
IMAGE = ("conv", "act", "image_norm", "residual", "cat", "split", "product", "squeeze", "slice", "shuffle")
IMAGE += ("pool", "tokens")
NAMES = {"image": IMAGE, "sequence": SEQUENCE, "pixels": tuple(name for name in SEQUENCE if name != "mixer")}
FREQUENT = ("mlp", "linear", "attention", "residual", "conv", "tokens")  # drawn twice as often
WEIGHTED = ("linear", "mlp", "attention", "conv")  # what "again" repeats
TOP = 2  # levels of branches in branches
STEPS = 14  # of a run


@st.composite
def models(draw):
    """(kind, width, steps, tied)."""
    kind = draw(st.sampled_from(["vectors", "text", "image"]))
    width = 3 if kind == "image" else draw(st.sampled_from(WIDTHS))
    steps, _ = draw(chains(width, "image" if kind == "image" else "sequence", TOP, 5))
    return kind, width, steps, kind == "text" and draw(st.booleans())


@st.composite
def chains(draw, width, place, depth, most):
    """(steps, the width that they end at); `depth` levels of branches may follow. `place` is a key of `NAMES`."""
    steps, widths = [], []  # before and after each step but "again"
    for _ in range(draw(st.integers(depth, most))):
        fitting = [n for n, (name, before, _) in enumerate(widths) if before == width and name in WEIGHTED]
        names = [name for name in NAMES[place] if fits(name, width, depth)]
        names += [name for name in names if name in FREQUENT] + ["again"] * bool(fitting)
        name = draw(st.sampled_from(names))
        if name == "again":
            number = draw(st.sampled_from(fitting))
            steps.append([name, number])
            width = widths[number][2]
            continue
        step, after = draw(one_step(name, width, place, depth))
        steps.append(step)
        widths.append((name, width, after))
        width = after
        if name == "tokens":
            place, widths = "pixels", [("tokens", 0, 0)] * len(widths)
    return steps, width


def fits(name, width, depth):
    if name in ("residual", "cat", "split", "product"):
        return depth > 0 and (name != "split" or width % 2 == 0)
    return name != "tokens" or depth == TOP  # branches end as they began


@st.composite
def one_step(draw, name, width, place, depth):
    """(step, the width after it)."""

    def one_of(*choices):
        return draw(st.sampled_from(choices))

    def divisor(*sizes):
        return one_of(*(n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)))

    out, flag = one_of(*WIDTHS), draw(st.booleans())
    match name:
        case "linear":
            return [name, out, one_of("bias", "none", "conv1d")], out
        case "act":
            return [name, one_of(*ACTIVATIONS)], width
        case "dropout":
            return [name, 0.1], width
        case "norm":
            return [name, one_of("layer", "rms", "batch")], width
        case "mlp":
            return [name, one_of(3, 5, 8, 16), one_of(*ACTIVATIONS), one_of("plain", "gated", "fused", "glu")], width
        case "attention":
            heads, how = one_of(1, 2, 3, 4, 6), one_of("plain", "explicit", "matmul", "gqa")
            return [name, heads, divisor(heads), one_of(2, 4), flag, how, draw(st.booleans())], width
        case "time_conv":
            return [name, out, one_of(1, 3), divisor(width, out)], out
        case "regroup":
            parts, out = divisor(width), one_of(2, 3, 4)
            return [name, parts, out, flag], parts * out
        case "conv":
            return [name, out, one_of(1, 3), one_of(1, 2) if depth == TOP else 1, divisor(width, out), flag], out
        case "image_norm":
            return [name, one_of("batch", "group"), divisor(width)], width
        case "mixer":
            return [name, one_of(3, 5, 8)], width
        case "slice":
            out = draw(st.integers(1, width))
            return [name, draw(st.integers(0, width - out)), out], out
        case "pool":
            return [name, one_of("max", "mean")], width
        case "squeeze":
            return [name, one_of(2, 4)], width
        case "shuffle":
            return [name, divisor(width)], width
        case "residual":
            steps, after = draw(chains(width, place, depth - 1, 3))
            close = (
                []
                if after == width
                else [["conv", width, 1, 1, 1, True] if place == "image" else ["linear", width, "bias"]]
            )
            return [name, steps + close, flag], width
        case "product":
            (one, after), (other, end) = (draw(chains(width, place, depth - 1, 2)) for _ in range(2))
            close = ["conv", after, 1, 1, 1, True] if place == "image" else ["linear", after, "none"]
            return [name, one, other if end == after else [*other, close], flag], after
        case "cat":
            branches = [draw(chains(width, place, depth - 1, 2)) for _ in range(2)]
            return [name, [steps for steps, _ in branches]], sum(after for _, after in branches)
        case "split":
            half, join = width // 2, one_of("cat", "add", "mul")
            steps, after = draw(chains(half, place, depth - 1, 2))
            if join == "cat" or after == half:
                return [name, steps, join], half + after if join == "cat" else half
            close = ["conv", half, 1, 1, 1, True] if place == "image" else ["linear", half, "bias"]
            return [name, [*steps, close], join], half
    return [name], width  # tokens


@st.composite
def runs(draw):
    """(model, keyword arguments of GETAConfig, name of the base optimizer); most fit a run of `STEPS` steps."""
    model = draw(models())
    return model, draw(options(model[0] == "text")), draw(st.sampled_from(["adamw", "sgd"]))


@st.composite
def options(draw, has_embedding):

    def one_of(*choices):
        return draw(st.sampled_from(choices))

    bits = [(8, 8), (2, 8), (4, 6), (2, 4, 8), (3, 3), (2, 2), (4, 8, 16)]
    weight_bits = one_of(None, *bits, *bits)
    options = {
        "weight_bits": weight_bits,
        "activation_bits": one_of(None, *bits[:5]) if weight_bits else None,
        "initial_bits": 16,
        "bit_reduction": one_of(4, 7, 16),
        "granularity": one_of("block", "tensor", "channel"),  # a short run draws hardly any of the third
        "saliency": one_of("fisher", "magnitude", "taylor", "mix"),
        "pruning_periods": one_of(1, 2, 3, 4),
        "warmup_steps": one_of(0, 2),
        "projection_steps": 4,
        "joint_steps": 4,
        "quantizer_learning_rate": one_of(1e-3, 1e-2),
        "min_groups": one_of(1, 1, 2),
        "group_divisible": one_of(1, 1, 2, 4),
    }
    match one_of("share", "share", "bops", "size"):
        case "share":
            options["group_sparsity"] = one_of(0.1, 0.3, 0.5, 0.7, 0.95, 0) if weight_bits else one_of(0.2, 0.5)
        case "bops":
            options |= {"target_bops": one_of(0.02, 0.1, 0.3, 0.8), "saliency": "fisher"}
        case "size":
            options |= {"target_size": one_of("1KB", "2KB", "4KB"), "saliency": "fisher"}
    if weight_bits:
        options["quantize_embeddings"] = one_of(None, None, 4, 8) if has_embedding else None
        if options["activation_bits"] is not None and max(options["activation_bits"]) < 16:
            options["outlier_activation_bits"] = one_of(None, None, 16)
        options["share_inputs"] = one_of(False, False, True)
    if options["granularity"] == "block":
        options["weight_block_size"] = 4
    options["uniform"] = one_of(*[False] * 11, True)
    options["optional_axes"] = one_of((), (), (), ("query_head",), ("head_dim",), ("query_head", "head_dim"))
    return options
