//! Reverse-mode differentiation as a transformation of `graph.rs`: nodes that compute the gradient of a scalar are
//! added to the graph that computes the scalar. One rule for each operator, in `rules/`. Gradients flow only towards
//! values that a parameter reaches, so a frozen base costs nothing below the first adapter. `recompute.rs` then decides
//! what the backward may keep.

use std::collections::BTreeMap;

use crate::graph::{Graph, GraphError, Node, NodeId, Phase, Region, ValueId};
use crate::op::{Op, Unary};
use crate::rules;

/// The gradient of the loss with respect to a value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Adjoint {
    /// A tensor of the value's shape.
    Dense(ValueId),
    /// Zero but for `values` at `indices` along an axis, as `GatherElements` leaves it. `LogSoftmax` takes it as it is,
    /// which spares a tensor of zeros as large as the vocabulary.
    Scattered { axis: usize, indices: ValueId, values: ValueId },
}

/// The graph under differentiation, and the gradients known so far.
#[derive(Debug)]
pub(crate) struct Tape<'g> {
    pub(crate) graph: &'g mut Graph,
    reached: Vec<bool>,
    adjoints: BTreeMap<ValueId, Adjoint>,
    negated: BTreeMap<ValueId, ValueId>,
}

/// Adds the gradient of `loss`, a scalar, with respect to each parameter; gives them in the order of `parameters`.
///
/// # Errors
/// A node between a parameter and the loss has no rule, or a parameter does not reach the loss.
pub fn differentiate(
    graph: &mut Graph,
    loss: ValueId,
    parameters: &[ValueId],
) -> Result<Vec<ValueId>, GraphError> {
    if graph.shape(loss).rank() != 0 {
        let (expected, got) = ("a scalar".into(), graph.shape(loss).to_string());
        return Err(GraphError::Type { op: "differentiate", subject: "loss", expected, got });
    }
    let forward: Vec<(NodeId, Node)> = graph.nodes().map(|(id, node)| (id, node.clone())).collect();
    let mut reached = vec![false; graph.values().len()];
    for &parameter in parameters {
        reached[parameter.index()] = true;
    }
    for (_, node) in &forward {
        let any = node.inputs.iter().any(|input| reached[input.index()]);
        for output in &node.outputs {
            reached[output.index()] |= any;
        }
    }
    let one = graph.scalar(1.0)?;
    let adjoints = BTreeMap::from([(loss, Adjoint::Dense(one))]);
    let mut tape = Tape { graph, reached, adjoints, negated: BTreeMap::new() };
    for (_, node) in forward.iter().rev() {
        if node
            .outputs
            .iter()
            .any(|output| tape.reached[output.index()] && tape.adjoints.contains_key(output))
        {
            let scope = node.name.rsplit_once('/').map_or("graph", |(scope, _)| scope);
            let scope = format!("backward.{scope}");
            tape.graph.enter_region(Region { scope, segment: node.segment, phase: Phase::Backward });
            rules::apply(&mut tape, node)?;
        }
    }
    parameters
        .iter()
        .map(|&parameter| match tape.adjoint(parameter)? {
            Some(gradient) => Ok(gradient),
            None => Err(GraphError::Unreached { name: tape.graph.value(parameter).name.clone() }),
        })
        .collect()
}

impl Tape<'_> {
    /// Whether a gradient with respect to this value leads to a parameter.
    pub(crate) fn wants(&self, value: ValueId) -> bool {
        self.reached.get(value.index()).is_some_and(|&reached| reached)
    }

    /// The gradient with respect to a value so far, as it is.
    pub(crate) fn take(&mut self, value: ValueId) -> Option<Adjoint> {
        self.adjoints.remove(&value)
    }

    /// The gradient with respect to a value so far, as a tensor.
    pub(crate) fn adjoint(&mut self, value: ValueId) -> Result<Option<ValueId>, GraphError> {
        match self.adjoints.get(&value).copied() {
            None => Ok(None),
            Some(adjoint) => self.dense(value, adjoint).map(Some),
        }
    }

    /// The gradient with respect to a value, zeros if it has none.
    pub(crate) fn adjoint_or_zeros(&mut self, value: ValueId) -> Result<ValueId, GraphError> {
        match self.adjoint(value)? {
            Some(adjoint) => Ok(adjoint),
            None => self.graph.fill(0.0, self.graph.shape(value).clone()),
        }
    }

    /// Adds a contribution to the gradient with respect to a value.
    pub(crate) fn give(&mut self, value: ValueId, contribution: ValueId) -> Result<(), GraphError> {
        let (expected, got) = (self.graph.shape(value), self.graph.shape(contribution));
        if expected != got {
            let (expected, got) = (expected.to_string(), got.to_string());
            return Err(GraphError::Type { op: "differentiate", subject: "gradient", expected, got });
        }
        let sum = match self.adjoint(value)? {
            Some(known) => self.graph.plus(known, contribution)?,
            None => contribution,
        };
        self.adjoints.insert(value, Adjoint::Dense(sum));
        Ok(())
    }

    /// Adds a contribution that is zero but for some elements.
    pub(crate) fn give_scattered(
        &mut self,
        value: ValueId,
        axis: usize,
        indices: ValueId,
        values: ValueId,
    ) -> Result<(), GraphError> {
        let scattered = Adjoint::Scattered { axis, indices, values };
        if self.adjoints.contains_key(&value) {
            let contribution = self.dense(value, scattered)?;
            return self.give(value, contribution);
        }
        self.adjoints.insert(value, scattered);
        Ok(())
    }

    /// `-x`, computed once for however many nodes need it.
    pub(crate) fn negated(&mut self, x: ValueId) -> Result<ValueId, GraphError> {
        if let Some(&known) = self.negated.get(&x) {
            return Ok(known);
        }
        let negated = self.graph.unary(Unary::Neg, x)?;
        self.negated.insert(x, negated);
        Ok(negated)
    }

    /// The tensor that an adjoint of `value` stands for.
    pub(crate) fn dense(&mut self, value: ValueId, adjoint: Adjoint) -> Result<ValueId, GraphError> {
        match adjoint {
            Adjoint::Dense(tensor) => Ok(tensor),
            Adjoint::Scattered { axis, indices, values } => {
                let zeros = self.graph.fill(0.0, self.graph.shape(value).clone())?;
                self.graph.add(Op::ScatterAdd { axis }, &[zeros, indices, values])
            }
        }
    }
}
