//! Ops without operands (weights, constants, counters), and the call of another function.

use serde::{Deserialize, Serialize};

use super::{OpDef, Primitive, attributes_by_serde, expect_args};
use crate::eval::{Data, Evaluator, Tensor};
use crate::types::{DType, Float, TensorType};

/// `weight`: a tensor of a checkpoint, in the dtype and shape it is stored in.
///
/// - `source`: which set of files (`model`, `gemma`, `upsampler` …); `key`: its name there. Inside a called function the
///   key is completed by the prefix of the call.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Weight {
    /// Set of files the tensor is in.
    pub source: String,
    /// Key, relative to the prefixes of the calls around it.
    pub key: String,
    /// Stored type.
    #[serde(with = "type_text")]
    pub ty: TensorType,
}

impl OpDef for Weight {
    attributes_by_serde!("weight");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 0)?;
        Ok(self.ty.clone())
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Weight {
    fn eval(&self, ev: &Evaluator, _: &[&Tensor], out: &TensorType) -> Tensor {
        ev.weight(&self.source, &self.key, out)
    }
}

/// `const`: a tensor known when the model is written. `values` holds every element, or one that fills the tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Const {
    /// Type of the tensor.
    #[serde(with = "type_text")]
    pub ty: TensorType,
    /// Elements in row-major order, or a single one for all.
    pub values: Values,
}

/// Elements of a [`Const`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Values {
    /// Floating point values.
    Float(Vec<Float>),
    /// Integers and truth values.
    Int(Vec<i64>),
}

impl Values {
    /// Number of stored values.
    pub fn len(&self) -> usize {
        match self {
            Values::Float(v) => v.len(),
            Values::Int(v) => v.len(),
        }
    }

    /// Whether nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Const {
    /// A scalar.
    pub fn scalar(value: f64, dtype: DType) -> Const {
        Const { ty: TensorType::new(dtype, []), values: Values::Float(vec![Float(value)]) }
    }

    /// The value if all elements are the same float.
    pub fn splat(&self) -> Option<f64> {
        match &self.values {
            Values::Float(v) if v.len() == 1 => Some(v[0].0),
            _ => None,
        }
    }
}

impl OpDef for Const {
    attributes_by_serde!("const");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 0)?;
        let (n, stored) = (self.ty.elements(), self.values.len());
        if stored != n && stored != 1 {
            return Err(format!("{} needs {n} values or 1, found {stored}", self.ty));
        }
        match (&self.values, self.ty.dtype.is_float()) {
            (Values::Float(v), true) if v.iter().all(|x| x.0.is_finite()) => {}
            (Values::Float(_), true) => return Err("values must be finite".into()),
            (Values::Int(_), false) => {}
            _ => return Err(format!("kind of the values does not fit {}", self.ty.dtype)),
        }
        Ok(self.ty.clone())
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Const {
    fn eval(&self, _: &Evaluator, _: &[&Tensor], out: &TensorType) -> Tensor {
        let n = out.elements();
        let data = match &self.values {
            Values::Float(v) if v.len() == n => Data::Float(v.iter().map(|x| x.0).collect()),
            Values::Float(v) => Data::Float(vec![v[0].0; n]),
            Values::Int(v) if v.len() == n => Data::Int(v.clone()),
            Values::Int(v) => Data::Int(vec![v[0]; n]),
        };
        Tensor { ty: out.clone(), data }
    }
}

/// `iota`: the index along `axis`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Iota {
    /// Type of the tensor, float or integer.
    #[serde(with = "type_text")]
    pub ty: TensorType,
    /// Axis that is counted.
    pub axis: usize,
}

impl OpDef for Iota {
    attributes_by_serde!("iota");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 0)?;
        if self.axis >= self.ty.rank() {
            return Err(format!("axis {} is out of range for {}", self.axis, self.ty));
        }
        Ok(self.ty.clone())
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Iota {
    fn eval(&self, _: &Evaluator, _: &[&Tensor], out: &TensorType) -> Tensor {
        let stride = out.strides()[self.axis];
        let extent = out.shape[self.axis];
        let index = |i: usize| (i / stride) % extent;
        let n = out.elements();
        let data = if out.dtype.is_float() {
            Data::Float((0..n).map(|i| index(i) as f64).collect())
        } else {
            Data::Int((0..n).map(|i| index(i) as i64).collect())
        };
        Tensor { ty: out.clone(), data }
    }
}

/// `call`: runs another function of the module. Its operands and results are those of the callee.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Call {
    /// Name of the callee.
    pub function: String,
    /// Put in front of every weight key of the callee.
    pub prefix: String,
    /// Name path of this call; the names inside the callee are relative to it.
    #[serde(default)]
    pub name: String,
}

/// Serialises a type as its text form, so that attributes read like the rest of the IR text.
mod type_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::types::TensorType;

    pub fn serialize<S: Serializer>(ty: &TensorType, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(ty)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<TensorType, D::Error> {
        let text = String::deserialize(d)?;
        TensorType::parse(&text).ok_or_else(|| D::Error::custom(format!("`{text}` is not a tensor type")))
    }
}
