//! What runs a layer during calibration: the doors that `layers.rs` goes through, and ONNX Runtime behind them. Nothing
//! else of this crate runs anything.

use std::error::Error;

use commonweal_runtime::{Library, network};

/// Why an engine failed.
pub type EngineError = Box<dyn Error + Send + Sync>;

/// Opens ONNX graphs.
pub trait Engine {
    /// Opens a graph of floats; everything that it reads is an input.
    fn open(&mut self, graph: &[u8]) -> Result<Box<dyn Network>, EngineError>;
}

/// An open graph.
pub trait Network {
    /// The values of every output, in the graph's order.
    fn run(&mut self, inputs: &[Input<'_>]) -> Result<Vec<Vec<f32>>, EngineError>;
}

/// A float tensor that a graph is given.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The graph's name for it.
    pub name: &'a str,
    /// Its sizes.
    pub shape: &'a [usize],
    /// Its values, row-major.
    pub values: &'a [f32],
}

impl Engine for Library {
    fn open(&mut self, graph: &[u8]) -> Result<Box<dyn Network>, EngineError> {
        Ok(Box::new(network::Network::open(self, graph)?))
    }
}

impl Network for network::Network {
    fn run(&mut self, inputs: &[Input<'_>]) -> Result<Vec<Vec<f32>>, EngineError> {
        let inputs: Vec<network::NamedTensor<'_>> =
            inputs.iter().map(|input| (input.name, input.shape, input.values)).collect();
        Ok(Self::run(self, &inputs)?)
    }
}
