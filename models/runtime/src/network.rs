//! An ONNX graph of floats from memory, for the compiler's calibration: nothing of a package is needed to run it. It
//! shares the [`Library`]'s thread pool with everything else.

use std::{borrow::Cow, fmt};

use ort::{
    session::{Session, SessionInputValue, builder::GraphOptimizationLevel},
    value::TensorRef,
};

use crate::library::Library;

/// An open graph.
pub struct Network {
    session: Session,
}

/// A float tensor that a graph is given: its name, its sizes, its values in row-major order.
pub type NamedTensor<'a> = (&'a str, &'a [usize], &'a [f32]);

/// Why a graph did not open or run.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The library refused the graph.
    #[error("graph of {bytes} bytes does not open")]
    Open {
        /// Length of the graph.
        bytes: usize,
        /// What the library said.
        #[source]
        source: ort::Error,
    },
    /// The graph failed.
    #[error("graph does not run")]
    Run(#[source] ort::Error),
}

impl Network {
    /// Opens a graph.
    pub fn open(library: &Library, graph: &[u8]) -> Result<Self, NetworkError> {
        let open = || {
            Session::builder(library.environment())?
                .with_optimization_level(GraphOptimizationLevel::All)?
                .with_memory_pattern(false)?
                .commit_from_memory(graph)
        };
        let session = open().map_err(|source| NetworkError::Open { bytes: graph.len(), source })?;
        Ok(Self { session })
    }

    /// The values of every output, in the graph's order. All inputs and outputs are floats.
    pub fn run(&mut self, inputs: &[NamedTensor<'_>]) -> Result<Vec<Vec<f32>>, NetworkError> {
        let mut given: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::with_capacity(inputs.len());
        for &(name, shape, values) in inputs {
            let tensor = TensorRef::from_array_view((shape, values)).map_err(NetworkError::Run)?;
            given.push((name.into(), tensor.into()));
        }
        let outputs = self.session.run(given).map_err(NetworkError::Run)?;
        outputs
            .values()
            .map(|output| Ok(output.try_extract_tensor::<f32>().map_err(NetworkError::Run)?.1.to_vec()))
            .collect()
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Network").finish_non_exhaustive()
    }
}
