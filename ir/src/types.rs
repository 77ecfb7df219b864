//! Element types and tensor types: the vocabulary shared by graph and plan.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Largest rank a tensor may have. Video activations need 5; depth-to-space needs 8 between its two reshapes.
pub const MAX_RANK: usize = 10;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DType {
    /// 32-bit float.
    #[default]
    F32,
    /// bfloat16.
    BF16,
    /// IEEE half.
    F16,
    /// 8-bit float, 4 exponent bits, no infinities (OCP e4m3fn).
    F8E4M3,
    /// 8-bit float, 5 exponent bits.
    F8E5M2,
    /// Signed byte.
    I8,
    /// Unsigned byte.
    U8,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// Truth value, one byte, 0 or 1.
    Bool,
}

impl DType {
    /// Every element type, in a fixed order.
    pub const ALL: [DType; 10] = [
        DType::F32,
        DType::BF16,
        DType::F16,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::I8,
        DType::U8,
        DType::I32,
        DType::U32,
        DType::Bool,
    ];

    /// Size of one element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::F8E4M3 | DType::F8E5M2 | DType::I8 | DType::U8 | DType::Bool => 1,
        }
    }

    /// Whether values are floating point.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3 | DType::F8E5M2)
    }

    /// Name in the text format.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::F8E4M3 => "f8e4m3",
            DType::F8E5M2 => "f8e5m2",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::Bool => "bool",
        }
    }

    /// The inverse of [`DType::name`].
    pub fn from_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name() == name)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Element type and static shape, row-major. Rank 0 is a scalar.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Extent of every axis, outermost first.
    pub shape: Vec<usize>,
}

impl TensorType {
    /// A type from its parts.
    pub fn new(dtype: DType, shape: impl Into<Vec<usize>>) -> TensorType {
        TensorType { dtype, shape: shape.into() }
    }

    /// f32 of the given shape.
    pub fn f32(shape: impl Into<Vec<usize>>) -> TensorType {
        TensorType::new(DType::F32, shape)
    }

    /// i32 of the given shape.
    pub fn i32(shape: impl Into<Vec<usize>>) -> TensorType {
        TensorType::new(DType::I32, shape)
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements. Saturates; the verifier refuses types whose size does not fit (see [`TensorType::checked_bytes`]).
    pub fn elements(&self) -> usize {
        self.shape.iter().fold(1usize, |n, &d| n.saturating_mul(d))
    }

    /// Size in bytes. Saturates like [`TensorType::elements`].
    pub fn bytes(&self) -> usize {
        self.elements().saturating_mul(self.dtype.bytes())
    }

    /// Size in bytes, or `None` if rank or size is out of range (more than 2^62 bytes).
    pub fn checked_bytes(&self) -> Option<usize> {
        if self.rank() > MAX_RANK {
            return None;
        }
        // A zero extent must not hide an overflow of the others: strides are computed from them too.
        let n = self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)))?;
        let bytes = n.checked_mul(self.dtype.bytes())?;
        (bytes <= 1 << 62).then_some(if self.shape.contains(&0) { 0 } else { bytes })
    }

    /// The same shape with another element type.
    pub fn with_dtype(&self, dtype: DType) -> TensorType {
        TensorType { dtype, shape: self.shape.clone() }
    }

    /// Row-major strides in elements.
    pub fn strides(&self) -> Vec<usize> {
        strides_of(&self.shape)
    }

    /// Parses the form that `Display` prints, for example `bf16[2,8]`.
    pub fn parse(text: &str) -> Option<TensorType> {
        let open = text.find('[')?;
        let dtype = DType::from_name(&text[..open])?;
        let inner = text[open + 1..].strip_suffix(']')?;
        let shape = if inner.is_empty() {
            Vec::new()
        } else {
            inner.split(',').map(|d| d.trim().parse().ok()).collect::<Option<Vec<usize>>>()?
        };
        Some(TensorType { dtype, shape })
    }
}

/// Row-major strides in elements of a shape.
pub fn strides_of(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1].saturating_mul(shape[i + 1]);
    }
    strides
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, d) in self.shape.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{d}")?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An `f64` attribute that can be compared and hashed by its bits. Never NaN in a verified graph.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Float(pub f64);

impl PartialEq for Float {
    fn eq(&self, other: &Float) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}
impl Eq for Float {}
impl std::hash::Hash for Float {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}
impl fmt::Debug for Float {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
impl From<f64> for Float {
    fn from(v: f64) -> Float {
        Float(v)
    }
}
impl From<f32> for Float {
    fn from(v: f32) -> Float {
        Float(v as f64)
    }
}
