#!/usr/bin/env python3
"""Writes tests/golden/weights/types.gguf: random blocks of every type with the values gguf-py reads from them.

Tensor `T` holds blocks of type T, tensor `T.values` the same as F32. The metadata has a value of every type, and the
alignment is not the default one. Needs numpy and gguf 0.19.0; the output is the same on every run.
"""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

ROWS, COLS = 2, 256
# The f16 scales of a block, as byte offsets.
SCALES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
    T.IQ4_NL: [0], T.IQ4_XS: [0], T.MXFP4: [],
}


def random_blocks(rng: np.random.Generator, kind: T) -> np.ndarray:
    """Bytes `(ROWS, bytes of a row)`; scales are small and finite."""
    values = rng.standard_normal((ROWS, COLS)).astype(np.float32)
    if kind == T.F32:
        return values.view(np.uint8)
    if kind in (T.F16, T.BF16):
        return gguf.quants.quantize(values, kind).view(np.uint8)
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS, COLS // block_len, block_bytes), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = (0.01 * rng.standard_normal(blocks.shape[:2])).astype(np.float16)
        blocks[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    if kind == T.MXFP4:
        # A scale that is a power of two; 0 and 1 are subnormal.
        blocks[:, :, 0] = np.where(blocks[:, :, 0] < 64, blocks[:, :, 0] % 2, 110 + blocks[:, :, 0] % 16)
    return blocks.reshape(ROWS, -1)


def main() -> None:
    out = Path(__file__).resolve().parents[2] / "tests" / "golden" / "weights" / "types.gguf"
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "golden")
    writer.add_custom_alignment(64)
    writer.add_uint8("value.u8", 2**8 - 1)
    writer.add_int8("value.i8", -(2**7))
    writer.add_uint16("value.u16", 2**16 - 1)
    writer.add_int16("value.i16", -(2**15))
    writer.add_uint32("value.u32", 2**32 - 1)
    writer.add_int32("value.i32", -(2**31))
    writer.add_uint64("value.u64", 2**64 - 1)
    writer.add_int64("value.i64", -(2**63))
    writer.add_float32("value.f32", 1e-5)
    writer.add_float64("value.f64", 1e-5)
    writer.add_bool("value.bool", True)
    writer.add_string("value.string", "naïve 🦙")
    writer.add_array("array.string", ["", "Ġthe", "🦙"])
    writer.add_array("array.i32", [-1, 0, 2**31 - 1])
    writer.add_array("array.f32", [0.5, -2.0])
    writer.add_array("array.bool", [True, False])

    rng = np.random.default_rng(0)
    for kind in (T.F32, T.F16, T.BF16, *SCALES):
        blocks = random_blocks(rng, kind)
        stored = {T.F32: np.float32, T.F16: np.float16}.get(kind)
        if stored:
            writer.add_tensor(kind.name, blocks.view(stored))
        else:
            writer.add_tensor(kind.name, blocks, raw_dtype=kind)
        values = gguf.quants.dequantize(blocks.view(stored) if stored else blocks, kind)
        writer.add_tensor(f"{kind.name}.values", np.ascontiguousarray(values, dtype=np.float32))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(out, out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
