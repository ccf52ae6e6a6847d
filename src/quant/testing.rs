//! Random blocks for tests.

use quantune_adapters::rng::Stream;

use super::BlockType;

/// `values` values of random blocks whose scales are small and finite.
pub(crate) fn random_blocks(block_type: BlockType, values: usize, seed: u64) -> Vec<u8> {
    let mut stream = Stream::new(seed, "blocks", &[]);
    let bytes = block_type.bytes_for(values).expect("whole blocks");
    let mut blocks: Vec<u8> = (0..bytes).map(|_| stream.next_u64() as u8).collect();
    for block in blocks.chunks_exact_mut(block_type.block_bytes()) {
        for &at in block_type.scale_offsets() {
            let scale = half::f16::from_f32(0.01 * stream.normal());
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        match block_type {
            BlockType::F32 => block.copy_from_slice(&stream.normal().to_le_bytes()),
            BlockType::F16 => {
                block.copy_from_slice(&half::f16::from_f32(stream.normal()).to_le_bytes());
            }
            BlockType::BF16 => {
                block.copy_from_slice(&half::bf16::from_f32(stream.normal()).to_le_bytes());
            }
            BlockType::MXFP4 => block[0] = 118 + block[0] % 8,
            _ => (),
        }
    }
    blocks
}
