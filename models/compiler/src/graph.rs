//! The intermediate representation: a list of typed values and of nodes that compute them, in an order in which each
//! node follows what it reads. `llama.rs` builds it, `differentiate.rs` and `recompute.rs` extend it, `plan.rs` orders
//! it, `lower.rs` writes it as ONNX. Types are checked when a node is added (`infer.rs`).

use std::collections::HashSet;

use crate::infer::infer;
use crate::op::Op;
use crate::shape::Shape;
pub use crate::tensor_type::{ElementType, TensorType};

/// A value of the graph that handed it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId(usize);

impl ValueId {
    /// Its place among [`Graph::values`].
    pub fn index(self) -> usize {
        self.0
    }
}

/// A node of the graph that handed it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(usize);

impl NodeId {
    /// Its place among [`Graph::nodes`].
    pub fn index(self) -> usize {
        self.0
    }
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The caller gives it.
    Input,
    /// An entry of `weights.bin`, perhaps under another shape of as many bytes.
    Weight {
        /// The entry's name in the weight table.
        entry: String,
    },
    /// A small constant kept in the graph.
    Constant(Constant),
    /// A node computes it.
    Node(NodeId),
}

/// A small constant, row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Constant {
    /// Floats.
    F32(Vec<f32>),
    /// Integers.
    I64(Vec<i64>),
}

/// A tensor: its name, type and origin.
#[derive(Clone, Debug)]
pub struct Value {
    /// Unique in the graph.
    pub name: String,
    /// Its type.
    pub kind: TensorType,
    /// Its origin.
    pub source: Source,
    /// Whether the backward may read it as the forward left it.
    keep: Option<Keep>,
}

/// How dear a forward value is to compute again (`recompute.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Kept unless whole layers are computed again.
    Activation,
    /// Kept always: a layer's input.
    Always,
}

/// Which direction a node belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The model itself.
    Forward,
    /// A second computation of a forward value, for the backward (`recompute.rs`).
    Again,
    /// Gradients.
    Backward,
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Node {
    /// Unique in the graph.
    pub name: String,
    /// What it does.
    pub op: Op,
    /// What it reads.
    pub inputs: Vec<ValueId>,
    /// What it computes.
    pub outputs: Vec<ValueId>,
    /// The part of the model (a layer, the head) that it belongs to.
    pub segment: usize,
    /// The direction that it belongs to.
    pub phase: Phase,
}

/// Why a node cannot be part of a graph.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// A name is taken.
    #[error("value names must be unique, got {name} twice")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// A node reads too few or too many values.
    #[error("{op} needs {expected} inputs, got {got}")]
    InputCount {
        /// The operator.
        op: &'static str,
        /// How many it reads.
        expected: usize,
        /// How many there are.
        got: usize,
    },
    /// An input has the wrong type.
    #[error("{op}: {subject} must be {expected}, got {got}")]
    Type {
        /// The operator.
        op: &'static str,
        /// Which input or attribute.
        subject: &'static str,
        /// What the operator needs.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// There is no differentiation rule.
    #[error("{op} cannot be differentiated: {reason}")]
    NotDifferentiable {
        /// The operator.
        op: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// A gradient was asked for a value that the loss does not depend on.
    #[error("the loss must depend on {name}, which it does not")]
    Unreached {
        /// The value.
        name: String,
    },
    /// A named size that no input has as a dimension of its own, so that nothing tells it when running.
    #[error("size {name} must be a dimension of an input, got none")]
    UnknownSize {
        /// The size.
        name: String,
    },
    /// A weight is missing from the table, or has another size there.
    #[error("weight {entry} must hold {expected}, got {got}")]
    Weight {
        /// The entry.
        entry: String,
        /// What the graph reads.
        expected: String,
        /// What the table has.
        got: String,
    },
}

/// The graph.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    values: Vec<Value>,
    nodes: Vec<Node>,
    names: HashSet<String>,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    region: Region,
}

/// Where new nodes belong.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) scope: String,
    pub(crate) segment: usize,
    pub(crate) phase: Phase,
}

impl Default for Region {
    fn default() -> Self {
        Self { scope: "graph".into(), segment: 0, phase: Phase::Forward }
    }
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// New nodes belong to this part of the model until the next call; `scope` begins their names.
    pub fn enter(&mut self, scope: impl Into<String>, segment: usize) {
        self.region = Region { scope: scope.into(), segment, phase: Phase::Forward };
    }

    pub(crate) fn enter_region(&mut self, region: Region) {
        self.region = region;
    }

    /// A value that the caller gives at each run.
    pub fn input(&mut self, name: impl Into<String>, kind: TensorType) -> Result<ValueId, GraphError> {
        let id = self.push_value(name.into(), kind, Source::Input)?;
        self.inputs.push(id);
        Ok(id)
    }

    /// A frozen tensor: `name` in the graph, `entry` in the weight table, whose bytes are read with type `kind`.
    pub fn weight(
        &mut self,
        name: impl Into<String>,
        entry: impl Into<String>,
        kind: TensorType,
    ) -> Result<ValueId, GraphError> {
        self.push_value(name.into(), kind, Source::Weight { entry: entry.into() })
    }

    /// A constant; equal constants are one value.
    pub fn constant(&mut self, constant: Constant, shape: impl Into<Shape>) -> Result<ValueId, GraphError> {
        let element = match constant {
            Constant::F32(_) => ElementType::F32,
            Constant::I64(_) => ElementType::I64,
        };
        let kind = TensorType { element, shape: shape.into() };
        let length = match &constant {
            Constant::F32(values) => values.len(),
            Constant::I64(values) => values.len(),
        };
        if kind.shape.elements().as_fixed() != Some(length) {
            return Err(GraphError::Type {
                op: "Constant",
                subject: "number of values",
                expected: kind.shape.elements().to_string(),
                got: length.to_string(),
            });
        }
        let source = Source::Constant(constant);
        let known = self.values.iter().position(|value| value.source == source && value.kind == kind);
        match known {
            Some(index) => Ok(ValueId(index)),
            None => self.push_value(format!("constant.{}", self.values.len()), kind, source),
        }
    }

    /// A float constant without dimensions.
    pub fn scalar(&mut self, value: f32) -> Result<ValueId, GraphError> {
        self.constant(Constant::F32(vec![value]), Shape::scalar())
    }

    /// Adds a node and gives its first output.
    pub fn add(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let node = self.add_node(op, inputs.to_vec())?;
        Ok(self.nodes[node.0].outputs[0])
    }

    /// Adds a node and gives all its outputs.
    pub fn add_many(&mut self, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>, GraphError> {
        let node = self.add_node(op, inputs.to_vec())?;
        Ok(self.nodes[node.0].outputs.clone())
    }

    fn add_node(&mut self, op: Op, inputs: Vec<ValueId>) -> Result<NodeId, GraphError> {
        let kinds: Vec<&TensorType> = inputs.iter().map(|&id| self.kind(id)).collect();
        let outputs = infer(&op, &kinds)?;
        let id = NodeId(self.nodes.len());
        let name = format!("{}/{}.{}", self.region.scope, op.name(), id.0);
        let several = outputs.len() > 1;
        let outputs = outputs
            .into_iter()
            .enumerate()
            .map(|(index, kind)| {
                let name = if several { format!("{name}.{index}") } else { name.clone() };
                self.push_value(name, kind, Source::Node(id))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let Region { segment, phase, .. } = self.region;
        self.nodes.push(Node { name, op, inputs, outputs, segment, phase });
        Ok(id)
    }

    /// Makes a value an output of the graph under a name of its own.
    pub fn output(&mut self, name: impl Into<String>, value: ValueId) -> Result<(), GraphError> {
        let name = name.into();
        let owned = matches!(self.values[value.0].source, Source::Node(_)) && !self.outputs.contains(&value);
        let value = if owned { value } else { self.add(Op::Identity, &[value])? };
        if !self.names.insert(name.clone()) {
            return Err(GraphError::DuplicateName { name });
        }
        self.names.remove(&self.values[value.0].name);
        self.values[value.0].name = name;
        self.outputs.push(value);
        Ok(())
    }

    fn push_value(&mut self, name: String, kind: TensorType, source: Source) -> Result<ValueId, GraphError> {
        if !self.names.insert(name.clone()) {
            return Err(GraphError::DuplicateName { name });
        }
        self.values.push(Value { name, kind, source, keep: None });
        Ok(ValueId(self.values.len() - 1))
    }

    /// Lets the backward read a value as the forward left it, rather than compute it again.
    pub fn keep(&mut self, value: ValueId, keep: Keep) {
        self.values[value.0].keep = Some(keep);
    }

    pub(crate) fn kept(&self, value: ValueId) -> Option<Keep> {
        self.values[value.0].keep
    }

    /// Takes all nodes out; values keep the places of the nodes that computed them until those are put back.
    pub(crate) fn take_nodes(&mut self) -> Vec<Node> {
        std::mem::take(&mut self.nodes)
    }

    /// Puts a node at the end, after those that it reads; its outputs exist.
    pub(crate) fn put_node(&mut self, node: Node) {
        let id = NodeId(self.nodes.len());
        for output in &node.outputs {
            self.values[output.0].source = Source::Node(id);
        }
        self.nodes.push(node);
    }

    /// A new value of the same type, for a second computation.
    pub(crate) fn twin(&mut self, value: ValueId) -> ValueId {
        let twin =
            Value { name: format!("{}/again", self.values[value.0].name), ..self.values[value.0].clone() };
        self.names.insert(twin.name.clone());
        self.values.push(twin);
        ValueId(self.values.len() - 1)
    }

    /// A value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0]
    }

    /// The value of that name.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.values.iter().position(|value| value.name == name).map(ValueId)
    }

    /// A value's type.
    pub fn kind(&self, id: ValueId) -> &TensorType {
        &self.values[id.0].kind
    }

    /// A value's shape.
    pub fn shape(&self, id: ValueId) -> &Shape {
        &self.values[id.0].kind.shape
    }

    /// The node that computes a value, if one does.
    pub fn producer(&self, id: ValueId) -> Option<NodeId> {
        match self.values[id.0].source {
            Source::Node(node) => Some(node),
            _ => None,
        }
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// All nodes, in the order in which they were added.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = (NodeId, &Node)> {
        self.nodes.iter().enumerate().map(|(index, node)| (NodeId(index), node))
    }

    /// All values.
    pub fn values(&self) -> impl ExactSizeIterator<Item = (ValueId, &Value)> {
        self.values.iter().enumerate().map(|(index, value)| (ValueId(index), value))
    }

    /// The values that the caller gives.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// The values that the caller gets.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }
}
