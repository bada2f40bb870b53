"""Golden codes for src/gptq.rs: GPTQ as the paper writes it (arXiv 2210.17323, algorithm 1), in NumPy and 64 bits.

Writes gptq.safetensors beside this file: weights, the inputs' XᵀX, and for each bits and block the codes and scales. The
scale's search is that of src/quantize.rs; everything else goes the paper's way, by the Cholesky factor of the inverse
Hessian and updates of all later columns, which the Rust code does not.

    python3 make_gptq.py        # numpy and safetensors
"""

import pathlib

import numpy
from safetensors.numpy import save_file

TRIES, STEP, DAMPING = 9, 0.1, 0.01


def search(block, zero):
    """The scale with the least squared error among a few tries."""
    extreme = block[numpy.argmax(numpy.abs(block))]
    best, best_gain = 0.0, 0.0
    if extreme == 0:
        return best
    for attempt in range(-TRIES, TRIES + 1):
        codes = numpy.clip(numpy.rint(block * -(zero + STEP * attempt) / extreme), -zero, zero - 1)
        square = codes @ codes
        gain = (block @ codes) ** 2 / square if square else 0.0
        if gain > best_gain:
            best, best_gain = block @ codes / square, gain
    return best


def gptq(weights, hessian, bits, size):
    weights, hessian, zero = weights.copy(), hessian.copy(), 1 << (bits - 1)
    dead = numpy.diag(hessian) == 0
    hessian[dead, dead] = 1
    weights[:, dead] = 0
    hessian += DAMPING * numpy.mean(numpy.diag(hessian)) * numpy.eye(len(hessian))
    inverse = numpy.linalg.cholesky(numpy.linalg.inv(hessian)).T
    codes, scales = numpy.zeros(weights.shape, int), []
    for column in range(weights.shape[1]):
        if column % size == 0:
            scale = numpy.array([search(row, zero) for row in weights[:, column : column + size]])
            scales.append(scale)
        safe = numpy.where(scale == 0, 1, scale)
        codes[:, column] = numpy.where(
            scale == 0, 0, numpy.clip(numpy.rint(weights[:, column] / safe), -zero, zero - 1)
        )
        error = (weights[:, column] - scale * codes[:, column]) / inverse[column, column]
        weights[:, column:] -= numpy.outer(error, inverse[column, column:])
    return codes + zero, numpy.stack(scales, axis=1)


def main():
    random = numpy.random.default_rng(7)
    rows, columns, tokens = 24, 256, 700
    weights = (random.standard_t(4, (rows, columns)) * 0.05).astype(numpy.float32)
    # Inputs that depend on each other and differ in size; two of them are always zero.
    inputs = random.standard_normal((tokens, columns)) @ random.standard_normal((columns, columns)) / 16
    inputs = (inputs * numpy.exp(random.standard_normal(columns))).astype(numpy.float32)
    inputs[:, [3, 200]] = 0
    gram = (inputs.T @ inputs).astype(numpy.float32)
    gram = (gram + gram.T) / 2
    tensors = {"weights": weights, "gram": gram}
    for bits, size in [(4, 32), (4, 64), (4, 128), (8, 32)]:
        codes, scales = gptq(weights.astype(float), gram.astype(float), bits, size)
        tensors[f"codes.{bits}.{size}"] = codes.astype(numpy.uint8)
        tensors[f"scales.{bits}.{size}"] = scales.astype(numpy.float32)
    save_file(tensors, pathlib.Path(__file__).parent / "gptq.safetensors")


if __name__ == "__main__":
    main()
