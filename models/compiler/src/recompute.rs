//! What the backward may keep of the forward. A value that a layer's backward reads and that was not kept
//! ([`Graph::keep`]) is computed again from kept ones, just before it is read: memory for a little time. Between
//! `differentiate.rs` and `plan.rs`.

use std::collections::BTreeMap;

use crate::graph::{Graph, Keep, Node, Phase, ValueId};

/// How much is computed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing: every forward value stays until its gradient is known.
    Nothing,
    /// What costs little: expanded weights, norms, gates, attention probabilities; not the products with weights.
    #[default]
    Activations,
    /// Whole layers from their inputs: the least memory, for about a third more time.
    Layers,
}

impl Recompute {
    fn keeps(self, keep: Option<Keep>) -> bool {
        match self {
            Self::Nothing => true,
            Self::Activations => keep.is_some(),
            Self::Layers => keep == Some(Keep::Always),
        }
    }
}

/// Redirects the backward to second computations of what the policy does not keep. The backward of `head_segment`
/// follows its forward at once and reads the first.
pub fn recompute(graph: &mut Graph, policy: Recompute, head_segment: usize) {
    let nodes = graph.take_nodes();
    let made = nodes.iter().flat_map(|node| node.outputs.iter().map(move |&output| (output, node)));
    let mut again = Again { producers: made.collect(), policy, copies: BTreeMap::new() };
    for node in &nodes {
        let mut node = node.clone();
        if node.phase == Phase::Backward && node.segment != head_segment {
            for input in &mut node.inputs {
                *input = again.value(graph, *input, node.segment);
            }
        }
        graph.put_node(node);
    }
}

struct Again<'n> {
    producers: BTreeMap<ValueId, &'n Node>,
    policy: Recompute,
    copies: BTreeMap<ValueId, ValueId>,
}

impl Again<'_> {
    /// The value itself if it is kept, else a second computation of it.
    fn value(&mut self, graph: &mut Graph, value: ValueId, segment: usize) -> ValueId {
        if let Some(&copy) = self.copies.get(&value) {
            return copy;
        }
        let Some(&node) = self.producers.get(&value) else { return value };
        if node.phase != Phase::Forward || self.policy.keeps(graph.kept(value)) {
            return value;
        }
        let mut copy = node.clone();
        for input in &mut copy.inputs {
            *input = self.value(graph, *input, segment);
        }
        copy.name = format!("{}/again", node.name);
        (copy.segment, copy.phase) = (segment, Phase::Again);
        copy.outputs = node.outputs.iter().map(|&output| graph.twin(output)).collect();
        self.copies.extend(node.outputs.iter().copied().zip(copy.outputs.iter().copied()));
        let result = self.copies.get(&value).copied().unwrap_or(value);
        graph.put_node(copy);
        result
    }
}
