//! Element types and shapes of tensors: what `infer.rs` computes and every value of `graph.rs` carries.

use std::fmt;

use crate::shape::Shape;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// 32-bit float.
    F32,
    /// 64-bit integer.
    I64,
    /// 32-bit integer.
    I32,
    /// Byte.
    U8,
    /// Signed byte.
    I8,
    /// Truth value.
    Bool,
}

impl ElementType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::U8 | Self::I8 | Self::Bool => 1,
        }
    }
}

/// A tensor's element type and shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Type of the elements.
    pub element: ElementType,
    /// Sizes.
    pub shape: Shape,
}

impl TensorType {
    /// A tensor of 32-bit floats.
    pub fn f32(shape: impl Into<Shape>) -> Self {
        Self { element: ElementType::F32, shape: shape.into() }
    }

    /// A tensor of 64-bit integers.
    pub fn i64(shape: impl Into<Shape>) -> Self {
        Self { element: ElementType::I64, shape: shape.into() }
    }

    /// A tensor of 32-bit integers.
    pub fn i32(shape: impl Into<Shape>) -> Self {
        Self { element: ElementType::I32, shape: shape.into() }
    }

    /// A tensor of bytes.
    pub fn u8(shape: impl Into<Shape>) -> Self {
        Self { element: ElementType::U8, shape: shape.into() }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{}", self.element, self.shape)
    }
}
