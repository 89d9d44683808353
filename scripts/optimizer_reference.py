#!/usr/bin/env python3
"""Writes what kernels/tests/optimizers.rs compares optimizers with: their parameters after 50 steps.

Adam, AdamW, SGD, Adagrad and Adafactor are PyTorch's, in f32. Lion, AdamP and Muon are their papers'
formulas, in f64: PyTorch has no Lion and no AdamP, and its Muon multiplies in bf16. AdamW with 8-bit states
is bitsandbytes', on the CPU, with its rounding to the nearest value. Set-up and use, from the project's root:

    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install torch numpy bitsandbytes
    /tmp/peers/bin/python scripts/optimizer_reference.py > kernels/tests/data/optimizers.json
"""

import json

import bitsandbytes
import numpy
import torch
from bitsandbytes.functional import create_dynamic_map

STEPS, RATE, DECAY = 50, 1e-2, 0.1
SHAPES = [[6, 5], [5, 8], [7]]
ELEMENTS = 1024


def values(seed, shape):
    """Numbers in [-1, 1) of a congruential generator, as in the test: each is a multiple of 2^-23."""
    state, out = seed, []
    for _ in range(int(numpy.prod(shape))):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.append((state >> 40) / 2**23 - 1)
    return numpy.array(out, dtype=numpy.float32).reshape(shape)


def gradient(step, number, shape):
    """The gradient of parameter `number` in a step: cubes, so that there are small ones."""
    drawn = values(1000 * step + number, shape)
    return drawn * drawn * drawn


def of_torch(make, shapes):
    """The parameters after a run of an optimizer of PyTorch's."""
    parameters = [torch.nn.Parameter(torch.tensor(values(n, s))) for n, s in enumerate(shapes)]
    optimizer = make(parameters)
    for step in range(1, STEPS + 1):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.tensor(gradient(step, number, shapes[number]))
        optimizer.step()
    return [parameter.detach().double().numpy() for parameter in parameters]


def of_formula(update, shapes):
    """The parameters after a run of `update(parameter, gradient, state, step)`, which returns new ones."""
    parameters = [values(n, s).astype(numpy.float64) for n, s in enumerate(shapes)]
    states = [{} for _ in shapes]
    for step in range(1, STEPS + 1):
        for number, shape in enumerate(shapes):
            drawn = gradient(step, number, shape).astype(numpy.float64)
            parameters[number] = update(parameters[number], drawn, states[number], step)
    return parameters


def lion(parameter, gradient, state, _step):
    """arXiv 2302.06675, algorithm 2."""
    beta1, beta2 = 0.9, 0.99
    moment = state.get("m", 0.0)
    direction = numpy.sign(beta1 * moment + (1 - beta1) * gradient)
    state["m"] = beta2 * moment + (1 - beta2) * gradient
    return parameter - RATE * (direction + DECAY * parameter)


def adam_direction(gradient, state, step, epsilon=1e-8):
    """Adam's direction, with the moments' bias corrected."""
    beta1, beta2 = 0.9, 0.999
    state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * gradient
    state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * gradient**2
    root = numpy.sqrt(state["v"] / (1 - beta2**step))
    return state["m"] / (1 - beta1**step) / (root + epsilon)


def adamp(delta):
    """arXiv 2006.08217, algorithm 2, by channel and then by layer; a part of the weight decay remains."""

    def update(parameter, gradient, state, step, epsilon=1e-8):
        direction = adam_direction(gradient, state, step)
        ratio = 1.0
        views = [(len(parameter), -1), (1, -1)] if parameter.ndim > 1 else []
        for view in views:
            weight, drawn = parameter.reshape(view), gradient.reshape(view)
            norms = [numpy.linalg.norm(x, axis=1) for x in (weight, drawn)]
            cosine = numpy.abs((weight * drawn).sum(axis=1)) / norms[0] / norms[1]
            if cosine.max() < delta / weight.shape[1] ** 0.5:
                unit = weight / (norms[0][:, None] + epsilon)
                along = (unit * direction.reshape(view)).sum(axis=1, keepdims=True)
                direction = direction - (unit * along).reshape(parameter.shape)
                ratio = 0.1
                break
        return parameter * (1 - RATE * DECAY * ratio) - RATE * direction

    return update


def muon(matched):
    """Newton-Schulz with the published coefficients; AdamW for vectors."""

    def update(parameter, gradient, state, step):
        kept = parameter * (1 - RATE * DECAY)
        if parameter.ndim != 2:
            return kept - RATE * adam_direction(gradient, state, step)
        momentum = 0.95
        state["m"] = momentum * state.get("m", 0.0) + (1 - momentum) * gradient
        x = (1 - momentum) * gradient + momentum * state["m"]
        rows, columns = x.shape
        x = x.T if rows > columns else x
        x = x / max(numpy.linalg.norm(x), 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        x = x.T if rows > columns else x
        factor = 0.2 * max(rows, columns) ** 0.5 if matched else max(1, rows / columns) ** 0.5
        return kept - RATE * factor * x

    return update


def cases():
    """Every case of the test, by name."""
    optim = torch.optim
    sgd = {"lr": RATE, "weight_decay": DECAY}
    made = {
        "AdamW": lambda p: optim.AdamW(p, lr=RATE, weight_decay=DECAY, foreach=False),
        "Adam": lambda p: optim.Adam(p, lr=RATE, weight_decay=DECAY, foreach=False),
        "SGD": lambda p: optim.SGD(p, **sgd, foreach=False),
        "SGD momentum": lambda p: optim.SGD(p, **sgd, momentum=0.9, foreach=False),
        "SGD dampened": lambda p: optim.SGD(p, **sgd, momentum=0.9, dampening=0.3, foreach=False),
        "SGD Nesterov": lambda p: optim.SGD(p, **sgd, momentum=0.9, nesterov=True, foreach=False),
        "Adagrad": lambda p: optim.Adagrad(p, lr=RATE, weight_decay=DECAY, foreach=False),
        "Adafactor": lambda p: optim.Adafactor(p, lr=RATE, weight_decay=DECAY, foreach=False),
    }
    formulas = {
        "Lion": lion,
        "AdamP": adamp(0.1),
        "AdamP near": adamp(1.2),
        "Muon": muon(False),
        "Muon matched": muon(True),
    }
    for name, make in made.items():
        yield name, of_torch(make, SHAPES)
    for name, update in formulas.items():
        yield name, of_formula(update, SHAPES)


def hexadecimal(array):
    """An array as the bytes of f32 or u8."""
    return numpy.asarray(array).tobytes().hex()


def to_nearest(states, code, largest, codes, block):
    """Quantizes to the nearest value, as bitsandbytes does on GPUs, and on the CPU for types that it has no
    table for. Its table for f32 has 65,536 equal cells, and so no value below 1.5e-5."""
    operation = torch.ops.bitsandbytes.quantize_blockwise
    for target, quantized in zip((codes, largest), operation(states.double(), code, block)):
        target.copy_(quantized)


def eight_bit():
    """AdamW of bitsandbytes with 8-bit states: codes after one step, parameters after 50."""
    bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct = to_nearest
    parameter = torch.nn.Parameter(torch.tensor(values(0, [ELEMENTS])))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=RATE, weight_decay=DECAY, min_8bit_size=1)
    codes = {}
    for step in range(1, STEPS + 1):
        parameter.grad = torch.tensor(values(1000 * step, [ELEMENTS]))
        optimizer.step()
        if step == 1:
            state = optimizer.state[parameter]
            codes = {name: hexadecimal(state[name].numpy()) for name in ("state1", "state2")}
    return {"codes": codes, "parameters": hexadecimal(parameter.detach().numpy())}


def main():
    result = {
        "versions": {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__},
        "parameters": {
            name: [[float(f"{x:.9g}") for x in parameter.flatten()] for parameter in parameters]
            for name, parameters in cases()
        },
        "codes": {
            "signed": hexadecimal(create_dynamic_map(signed=True).numpy()),
            "unsigned": hexadecimal(create_dynamic_map(signed=False).numpy()),
        },
        "eight_bit": eight_bit(),
    }
    print(json.dumps(result, separators=(",", ":")))


if __name__ == "__main__":
    main()
