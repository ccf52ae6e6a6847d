//! The LoRA family over candle tensors, in PEFT's file format.

pub mod rng;
