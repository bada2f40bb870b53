//! Compiles a Hugging Face checkpoint into a package.
//!
//! Modules in the order that data passes them.

pub mod architecture;
mod said;
mod gemma;
pub mod config;
pub mod tensors;
pub mod tokenizer;
pub mod checkpoint;
pub mod quantize;
pub mod gptq;
pub mod shape;
mod tensor_type;
pub mod op;
mod infer;
pub mod graph;
mod build;
mod rules;
pub mod llama;
pub mod differentiate;
pub mod recompute;
pub mod plan;
pub mod weights;
pub mod onnx;
pub mod lower;
pub mod engine;
pub mod layers;
pub mod calibrate;
pub mod cache_scales;
pub mod graphs;
pub mod compile;
pub mod encoder;
pub mod random;
#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use commonweal_package::{
    Accuracy, Architecture, Attention, Bias, Bits, EncoderArchitecture, Gemma, ModelConfig, Probabilities,
    Quantization, RopeScaling, Tokens, Window,
};
