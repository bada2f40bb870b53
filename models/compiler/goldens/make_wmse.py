"""Golden codes for the weighted search of src/quantize.rs, in NumPy and 64 bits: the weights of gptq.safetensors, each by
itself to the nearest code, with the scale whose squared error is least when a weight's counts as often as it is large.

Writes wmse.safetensors beside this file.

    python3 make_wmse.py        # after make_gptq.py; numpy and safetensors
"""

import pathlib

import numpy
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent


def nearest(blocks, scales, zero):
    return numpy.clip(numpy.rint(blocks / scales[:, None]), -zero, zero - 1)


def main():
    weights, tensors = load_file(HERE / "gptq.safetensors")["weights"].astype(float), {}
    for bits, size in [(4, 32), (4, 64), (4, 128), (8, 32)]:
        blocks, zero = weights.reshape(-1, size), 1 << (bits - 1)
        extreme = blocks[numpy.arange(len(blocks)), numpy.abs(blocks).argmax(1)]
        tries = []
        for attempt in range(-9, 10):
            codes = nearest(blocks, -extreme / (zero + 0.1 * attempt), zero)
            # The scale that is best for these codes, by weighted least squares.
            root = numpy.sqrt(numpy.abs(blocks))
            fitted = [numpy.linalg.lstsq(c[:, None], b, rcond=None)[0][0] for c, b in zip(root * codes, root * blocks)]
            scales = numpy.array(fitted)
            errors = (numpy.abs(blocks) * (blocks - scales[:, None] * codes) ** 2).sum(1)
            tries.append((errors, scales, codes))
        best = numpy.argmin([errors for errors, _, _ in tries], axis=0)
        pick = lambda which: numpy.array([tries[t][which][row] for row, t in enumerate(best)])  # noqa: E731
        tensors[f"scales.{bits}.{size}"] = pick(1).astype(numpy.float32)
        tensors[f"codes.{bits}.{size}"] = (pick(2) + zero).astype(numpy.uint8)
    save_file(tensors, HERE / "wmse.safetensors")


if __name__ == "__main__":
    main()
