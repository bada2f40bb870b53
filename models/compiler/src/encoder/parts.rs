//! The parts that encoders are built of: entries of `weights.bin` by one convention, and the pieces of a graph that
//! read them. `bert.rs`, `deberta.rs` and `modernbert.rs` put them together.
//!
//! A linear layer `x` has the matrix `x` (packed as the quantization says) and, where it has one, the bias `x_bias.w`;
//! a norm has `x.w` and perhaps `x_bias.w`. What is small or picked row by row stays in floats.

use commonweal_package::{EncoderConfig, Quantization};

use crate::architecture::Source;
use crate::graph::{Constant, ElementType, Graph, GraphError, TensorType, ValueId};
use crate::llama::{multiply, packed_rows, packing};
use crate::op::{MultiHeadAttention, Op};
use crate::shape::{Dim, Shape};

/// Added to the scores of tokens that must not be seen: finite, so that a row of nothing else stays a number, and large
/// enough to leave a share of exactly zero beside any score.
const UNSEEN: f32 = -1e30;

/// Entries of `weights.bin`, in order.
#[derive(Default)]
pub(super) struct Entries(pub(super) Vec<(String, Source)>);

impl Entries {
    /// A linear layer, stacked from the checkpoint's layers of these names and rows.
    pub(super) fn linear(&mut self, name: &str, theirs: &[(String, usize)], columns: usize, bias: bool) {
        let tensors =
            |kind: &str| theirs.iter().map(|(part, rows)| (format!("{part}.{kind}"), *rows)).collect();
        self.0.push((name.into(), Source::Matrix(tensors("weight"), columns)));
        if bias {
            self.0.push((format!("{name}_bias"), Source::Vector(tensors("bias"))));
        }
    }

    /// The last layer, in floats: it is small, and every error in it is one of the answer.
    pub(super) fn classifier(&mut self, theirs: &str, labels: usize, columns: usize) {
        self.plain("classifier", &format!("{theirs}.weight"), labels, columns);
        self.0.push(("classifier_bias".into(), Source::Vector(vec![(format!("{theirs}.bias"), labels)])));
    }

    /// A matrix in floats.
    pub(super) fn plain(&mut self, name: &str, theirs: &str, rows: usize, columns: usize) {
        self.0.push((name.into(), Source::Plain(theirs.into(), rows, columns)));
    }

    /// A norm over the hidden width.
    pub(super) fn norm(&mut self, name: &str, theirs: &str, width: usize, bias: bool) {
        let tensor = |kind: &str| Source::Vector(vec![(format!("{theirs}.{kind}"), width)]);
        self.0.push((name.into(), tensor("weight")));
        if bias {
            self.0.push((format!("{name}_bias"), tensor("bias")));
        }
    }

    /// The embedding of words.
    pub(super) fn words(&mut self, theirs: &str, encoder: &EncoderConfig) {
        self.0.push((
            "embed".into(),
            Source::Matrix(vec![(theirs.into(), encoder.vocab_size)], encoder.hidden_size),
        ));
    }
}

/// A graph in the making.
pub(super) struct Parts<'a> {
    pub(super) graph: Graph,
    pub(super) encoder: &'a EncoderConfig,
    quantization: &'a Quantization,
    tokens: ValueId,
    types: Option<ValueId>,
    lengths: ValueId,
}

type Built = Result<ValueId, GraphError>;

impl<'a> Parts<'a> {
    pub(super) fn new(
        encoder: &'a EncoderConfig,
        quantization: &'a Quantization,
    ) -> Result<Self, GraphError> {
        let mut graph = Graph::new();
        let ids = TensorType::i64([batch(), time()]);
        let tokens = graph.input("input_ids", ids.clone())?;
        let lengths = graph.input("lengths", TensorType::i64([batch()]))?;
        let types = if encoder.token_types > 1 { Some(graph.input("token_type_ids", ids)?) } else { None };
        Ok(Self { graph, encoder, quantization, tokens, types, lengths })
    }

    /// `x Wᵀ`, plus the bias if the layer has one.
    pub(super) fn linear(
        &mut self,
        name: &str,
        (rows, columns): (usize, usize),
        bias: bool,
        x: ValueId,
    ) -> Built {
        let product = multiply(&mut self.graph, self.quantization, name, (rows, columns), x)?;
        if bias { self.plus_bias(name, rows, product) } else { Ok(product) }
    }

    /// The logits, from `[batch, hidden]`.
    pub(super) fn classifier(&mut self, x: ValueId) -> Built {
        let labels = self.encoder.labels.len();
        let weight = self.matrix("classifier", labels, self.encoder.hidden_size)?;
        let product = self.graph.matmul_transposed(x, weight)?;
        self.plus_bias("classifier", labels, product)
    }

    pub(super) fn norm(&mut self, name: &str, epsilon: f32, bias: bool, x: ValueId) -> Built {
        let width = self.encoder.hidden_size;
        let mut inputs = vec![x, self.vector(name, width)?];
        if bias {
            inputs.push(self.vector(&format!("{name}_bias"), width)?);
        }
        self.graph.add(Op::LayerNorm { epsilon }, &inputs)
    }

    /// Rows of the embedding of words, `[batch, time, hidden]`.
    pub(super) fn words(&mut self) -> Built {
        let (vocab, hidden) = (self.encoder.vocab_size, self.encoder.hidden_size);
        if let Some(packing) = packing(self.quantization) {
            let (weights, scales) = packed_rows(&mut self.graph, "embed", (vocab, hidden), packing)?;
            let rows =
                self.graph.add(Op::GatherBlockQuantized { packing }, &[weights, self.tokens, scales])?;
            self.graph.narrowed(rows, hidden)
        } else {
            let weights = self.matrix("embed", vocab, hidden)?;
            self.graph.add(Op::Gather { axis: 0 }, &[weights, self.tokens])
        }
    }

    /// Adds a learned row for each position; the first position has row `start` of `rows`.
    pub(super) fn plus_positions(&mut self, x: ValueId, start: usize, rows: usize) -> Built {
        let table = self.matrix("positions", rows, self.encoder.hidden_size)?;
        let used = Op::Slice { axis: 0, start, length: self.encoder.context };
        let used = self.graph.add(used, &[table])?;
        let places = self.graph.add(Op::Range(time()), &[])?;
        let positions = self.graph.add(Op::Gather { axis: 0 }, &[used, places])?;
        self.graph.plus(x, positions)
    }

    /// Adds a learned row for each token's kind; where there is one kind only, it is every token's.
    pub(super) fn plus_types(&mut self, x: ValueId) -> Built {
        let (kinds, hidden) = (self.encoder.token_types, self.encoder.hidden_size);
        if kinds == 0 {
            return Ok(x);
        }
        let table = self.matrix("types", kinds, hidden)?;
        let rows = match self.types {
            Some(types) => self.graph.add(Op::Gather { axis: 0 }, &[table, types])?,
            None => self.graph.reshape(table, [hidden])?,
        };
        self.graph.plus(x, rows)
    }

    /// What is added to the scores, `[batch, 1, time, time]`: nothing where the key is a token of the row.
    pub(super) fn padding(&mut self) -> Built {
        let is_token =
            self.is_token([batch(), 1.into(), 1.into(), 1.into()], [1.into(), 1.into(), 1.into(), time()])?;
        let (seen, unseen) = (self.graph.scalar(0.0)?, self.graph.scalar(UNSEEN)?);
        let row = self.graph.add(Op::Where, &[is_token, seen, unseen])?;
        self.graph.add(Op::Expand([batch(), 1.into(), time(), time()].into()), &[row])
    }

    /// `bias` where key and query are at most `reach` tokens apart, so little that nothing is seen elsewhere.
    pub(super) fn within(&mut self, reach: usize, bias: ValueId) -> Built {
        let apart = self.distances()?;
        let square = self.graph.times(apart, apart)?;
        let square = self.graph.reshape(square, [1.into(), 1.into(), time(), time()])?;
        // Between two whole distances, so that the rounding of large squares does not matter.
        let limit = self.graph.scalar((reach as f32 + 0.5).powi(2))?;
        let is_near = self.graph.add(Op::Less, &[square, limit])?;
        let unseen = self.graph.scalar(UNSEEN)?;
        self.graph.add(Op::Where, &[is_near, bias, unseen])
    }

    /// How far each query lies behind each key, in floats `[time, time]`; exact below 2^24.
    pub(super) fn distances(&mut self) -> Built {
        let places = self.graph.add(Op::Range(time()), &[])?;
        let places = self.graph.add(Op::Cast(ElementType::F32), &[places])?;
        let queries = self.graph.reshape(places, [time(), 1.into()])?;
        let keys = self.graph.reshape(places, [1.into(), time()])?;
        self.graph.minus(queries, keys)
    }

    pub(super) fn attention(&mut self, qkv: [ValueId; 3], bias: ValueId, scale: f32) -> Built {
        let [query, key, value] = qkv;
        let attributes = MultiHeadAttention { heads: self.encoder.heads, scale };
        self.graph.add(Op::MultiHeadAttention(attributes), &[query, key, value, bias])
    }

    /// Pieces of equal width of the last of three axes.
    pub(super) fn thirds(&mut self, x: ValueId) -> Result<[ValueId; 3], GraphError> {
        let sizes = vec![self.encoder.hidden_size.into(); 3];
        let parts = self.graph.add_many(Op::Split { axis: 2, sizes }, &[x])?;
        Ok([parts[0], parts[1], parts[2]])
    }

    /// The first token of each row, `[batch, hidden]`.
    pub(super) fn first(&mut self, x: ValueId) -> Built {
        let zero = self.graph.constant(Constant::I64(vec![0]), [1])?;
        let first = self.graph.add(Op::Gather { axis: 1 }, &[x, zero])?;
        self.graph.reshape(first, [batch(), self.encoder.hidden_size.into()])
    }

    /// The mean of each row's tokens, `[batch, hidden]`.
    pub(super) fn mean(&mut self, x: ValueId) -> Built {
        let is_token = self.is_token([batch(), 1.into(), 1.into()], [1.into(), time(), 1.into()])?;
        let (one, zero) = (self.graph.scalar(1.0)?, self.graph.scalar(0.0)?);
        let counted = self.graph.add(Op::Where, &[is_token, one, zero])?;
        let counted = self.graph.times(x, counted)?;
        let sum = self.graph.sum_over(counted, vec![1])?;
        let sum = self.graph.reshape(sum, [batch(), self.encoder.hidden_size.into()])?;
        let count = self.graph.add(Op::Cast(ElementType::F32), &[self.lengths])?;
        let count = self.graph.reshape(count, [batch(), 1.into()])?;
        self.graph.over(sum, count)
    }

    pub(super) fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Built {
        self.weight(&format!("{name}.w"), TensorType::f32([rows, columns]))
    }

    /// Whether each position is a token of its row, with the lengths and the positions in these shapes.
    fn is_token<const N: usize>(&mut self, lengths: [Dim; N], places: [Dim; N]) -> Built {
        let range = self.graph.add(Op::Range(time()), &[])?;
        let range = self.graph.reshape(range, Shape::from(places))?;
        let lengths = self.graph.reshape(self.lengths, Shape::from(lengths))?;
        self.graph.add(Op::Less, &[range, lengths])
    }

    fn plus_bias(&mut self, name: &str, rows: usize, x: ValueId) -> Built {
        let bias = self.vector(&format!("{name}_bias"), rows)?;
        self.graph.plus(x, bias)
    }

    fn vector(&mut self, name: &str, size: usize) -> Built {
        self.weight(&format!("{name}.w"), TensorType::f32([size]))
    }

    /// An entry of `weights.bin`, once in the graph: contents and relative positions may share a layer.
    fn weight(&mut self, entry: &str, kind: TensorType) -> Built {
        match self.graph.find(entry) {
            Some(known) => Ok(known),
            None => self.graph.weight(entry, entry, kind),
        }
    }
}

pub(super) fn batch() -> Dim {
    Dim::named("batch")
}

pub(super) fn time() -> Dim {
    Dim::named("time")
}
