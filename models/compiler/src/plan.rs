//! The order in which the nodes are written, and what it costs. Any order in which each node follows what it reads
//! computes the same, but a value is freed after its last reader, so the order decides how many bytes are alive at
//! once. Between `recompute.rs` and `lower.rs`.
//!
//! ONNX Runtime does not run nodes in the order of the file. It walks from the outputs that no node reads, the last of
//! the file first, depth first towards the inputs, among a node's inputs to the one written last, and runs a node when
//! it leaves it (`Graph::ReverseDFSFrom`, from the constructor of `GraphViewer`). So what is written *early* runs as
//! *late* as its reader allows, and [`Plan::order`] is chosen for what the walk makes of it ([`Plan::execution`]).

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{Graph, Node, NodeId, Phase, Source, ValueId};
use crate::op::Op;
use crate::shape::Bindings;

/// An order of the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Every node once, each after those that it reads: the order of the file.
    pub order: Vec<NodeId>,
    /// The order in which ONNX Runtime runs them.
    pub execution: Vec<NodeId>,
}

/// The most memory that computed values take at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peak {
    /// Bytes of values alive.
    pub bytes: usize,
    /// The node during which they are.
    pub node: String,
}

/// Places in the file, by what should run late: expanded weights just before the product that reads them, second
/// computations just before the gradient that reads them; and gradients of parameters, which nothing reads, as soon as
/// they can, which in the walk from the end means backwards.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Frozen,
    Forward,
    Again,
    Backward,
    Output,
    Gradient,
}

/// Chooses the order of the file.
pub fn plan(graph: &Graph) -> Plan {
    let readers = readers(graph);
    let mut frozen = vec![false; graph.nodes().len()];
    let mut places = BTreeMap::<Place, Vec<NodeId>>::new();
    for (id, node) in graph.nodes() {
        let known = node.inputs.iter().all(|&input| match graph.value(input).source {
            Source::Weight { .. } | Source::Constant(_) => true,
            Source::Input => false,
            Source::Node(producer) => frozen[producer.index()],
        });
        frozen[id.index()] = known && !sized_by_inputs(node);
        let unread = node.outputs.iter().all(|output| readers[output.index()].is_empty());
        let place = match node.phase {
            _ if frozen[id.index()] => Place::Frozen,
            Phase::Backward if unread => Place::Gradient,
            _ if unread => Place::Output,
            Phase::Forward => Place::Forward,
            Phase::Again => Place::Again,
            Phase::Backward => Place::Backward,
        };
        places.entry(place).or_default().push(id);
    }
    if let Some(gradients) = places.get_mut(&Place::Gradient) {
        gradients.reverse();
    }
    let order: Vec<NodeId> = places.into_values().flatten().collect();
    Plan { execution: execution(graph, &order), order }
}

impl Plan {
    /// The most bytes alive at once when the nodes run in the order of `execution` with inputs of these sizes. Values
    /// that the runtime library computes in the place of another are counted twice, so it is an upper bound but for
    /// the library's own scratch space.
    pub fn peak(&self, graph: &Graph, bindings: &Bindings) -> Peak {
        let bytes: Vec<usize> = graph
            .values()
            .map(|(_, value)| match value.source {
                Source::Node(_) => {
                    let elements = value.kind.shape.elements().evaluate(bindings).unwrap_or(0);
                    elements.saturating_mul(value.kind.element.size_bytes())
                }
                _ => 0,
            })
            .collect();
        let mut left: Vec<usize> = readers(graph).iter().map(BTreeSet::len).collect();
        for output in graph.outputs() {
            left[output.index()] += 1;
        }
        let (mut live, mut peak) = (0_usize, Peak { bytes: 0, node: String::new() });
        for &id in &self.execution {
            let node = graph.node(id);
            live = node.outputs.iter().fold(live, |live, output| live.saturating_add(bytes[output.index()]));
            if live > peak.bytes {
                peak = Peak { bytes: live, node: node.name.clone() };
            }
            for input in inputs(node) {
                left[input.index()] -= 1;
            }
            let done = inputs(node).into_iter().chain(node.outputs.iter().copied());
            live -= done
                .filter(|value| left[value.index()] == 0)
                .map(|value| bytes[value.index()])
                .sum::<usize>();
        }
        peak
    }
}

/// Each input of a node once.
fn inputs(node: &Node) -> BTreeSet<ValueId> {
    node.inputs.iter().copied().collect()
}

/// Which nodes read each value.
fn readers(graph: &Graph) -> Vec<BTreeSet<NodeId>> {
    let mut readers = vec![BTreeSet::new(); graph.values().len()];
    for (id, node) in graph.nodes() {
        for input in &node.inputs {
            readers[input.index()].insert(id);
        }
    }
    readers
}

/// Whether a node without inputs still depends on their sizes.
fn sized_by_inputs(node: &Node) -> bool {
    match &node.op {
        Op::Range(dim) => dim.as_fixed().is_none(),
        Op::Fill { shape, .. } | Op::Expand(shape) | Op::Reshape(shape) => shape.as_fixed().is_none(),
        _ => false,
    }
}

/// The order in which ONNX Runtime runs nodes that are written in `order`.
fn execution(graph: &Graph, order: &[NodeId]) -> Vec<NodeId> {
    enum Step {
        Enter(NodeId),
        Leave(NodeId),
    }
    let mut places = vec![0; order.len()];
    for (place, id) in order.iter().enumerate() {
        places[id.index()] = place;
    }
    let readers = readers(graph);
    let unread =
        |id: &&NodeId| graph.node(**id).outputs.iter().all(|output| readers[output.index()].is_empty());
    let mut stack: Vec<Step> = order.iter().filter(unread).map(|&id| Step::Enter(id)).collect();
    let mut entered = vec![false; order.len()];
    let mut execution = Vec::with_capacity(order.len());
    while let Some(step) = stack.pop() {
        match step {
            Step::Leave(id) => execution.push(id),
            Step::Enter(id) if entered[id.index()] => {}
            Step::Enter(id) => {
                entered[id.index()] = true;
                stack.push(Step::Leave(id));
                let producers = graph.node(id).inputs.iter().filter_map(|&input| graph.producer(input));
                let mut producers: Vec<NodeId> = producers.filter(|id| !entered[id.index()]).collect();
                producers.sort_by_key(|id| places[id.index()]);
                stack.extend(producers.into_iter().map(Step::Enter));
            }
        }
    }
    execution
}
