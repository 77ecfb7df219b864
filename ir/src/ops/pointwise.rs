//! Ops that work on each element alone. Operands broadcast like NumPy: aligned at the last axis, extent 1 stretches.

use serde::{Deserialize, Serialize};

use super::{OpDef, Primitive, attributes_by_serde, expect_args, expect_float};
use crate::eval::{Data, Evaluator, Tensor};
use crate::types::{DType, TensorType};

/// Shape that two shapes broadcast to, `None` if they do not fit.
pub fn broadcast_shapes(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| if i + s.len() < rank { 1 } else { s[i + s.len() - rank] };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

fn broadcast_of(args: &[&TensorType]) -> Result<Vec<usize>, String> {
    args.iter().try_fold(Vec::new(), |shape, ty| {
        broadcast_shapes(&shape, &ty.shape).ok_or_else(|| format!("{ty} does not broadcast to {shape:?}"))
    })
}

/// Implements the text half of [`OpDef`] for an enum whose variants are op names.
macro_rules! named_by_variant {
    ($ty:ident { $($variant:ident = $name:literal),* $(,)? }) => {
        const NAMES: &'static [&'static str] = &[$($name),*];
        fn name(&self) -> &'static str {
            match self { $($ty::$variant => $name),* }
        }
        fn attributes(&self) -> serde_json::Value {
            serde_json::Value::Object(Default::default())
        }
        fn from_text(name: &str, _: serde_json::Value) -> Result<Self, String> {
            match name { $($name => Ok($ty::$variant),)* _ => Err(format!("unknown op `{name}`")) }
        }
    };
}

/// Functions of one operand, on floats; `neg` and `abs` also on integers. Result: type of the operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are the definitions
pub enum Unary {
    Neg,
    Abs,
    Exp,
    Log,
    Sqrt,
    Rsqrt,
    Sin,
    Cos,
    Tanh,
    Erf,
}

impl Unary {
    /// The function in f64.
    pub fn apply(self, x: f64) -> f64 {
        match self {
            Unary::Neg => -x,
            Unary::Abs => x.abs(),
            Unary::Exp => x.exp(),
            Unary::Log => x.ln(),
            Unary::Sqrt => x.sqrt(),
            Unary::Rsqrt => 1.0 / x.sqrt(),
            Unary::Sin => x.sin(),
            Unary::Cos => x.cos(),
            Unary::Tanh => x.tanh(),
            Unary::Erf => erf(x),
        }
    }
}

impl OpDef for Unary {
    named_by_variant!(Unary {
        Neg = "neg",
        Abs = "abs",
        Exp = "exp",
        Log = "log",
        Sqrt = "sqrt",
        Rsqrt = "rsqrt",
        Sin = "sin",
        Cos = "cos",
        Tanh = "tanh",
        Erf = "erf",
    });
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        if !matches!(self, Unary::Neg | Unary::Abs) {
            expect_float(args[0], "operand")?;
        }
        Ok(args[0].clone())
    }
}

impl Primitive for Unary {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let data = match &args[0].data {
            Data::Float(v) => Data::Float(v.iter().map(|&x| self.apply(x)).collect()),
            Data::Int(v) => Data::Int(
                v.iter().map(|&x| if *self == Unary::Abs { x.wrapping_abs() } else { x.wrapping_neg() }).collect(),
            ),
        };
        Tensor { ty: out.clone(), data }
    }
}

/// Error function, by its Maclaurin series where that converges fast and a continued fraction elsewhere; 1e-15.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 3.0 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-17 * sum.abs() {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
            if n > 200.0 {
                break;
            }
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let mut f = a;
        for k in (1..=60).rev() {
            f = a + (k as f64 / 2.0) / f;
        }
        1.0 - (-a * a).exp() / (f * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}

/// Functions of two operands of one kind (both float or both integer).
///
/// Result: broadcast shape, dtype of the **first** operand. A float of another dtype is widened exactly first, so a bf16
/// weight can be added to an f32 activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are the definitions
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    Pow,
}

impl Binary {
    /// The function in f64.
    pub fn apply(self, a: f64, b: f64) -> f64 {
        match self {
            Binary::Add => a + b,
            Binary::Sub => a - b,
            Binary::Mul => a * b,
            Binary::Div => a / b,
            // NaN must survive, unlike in f64::max.
            Binary::Max => {
                if a > b || a.is_nan() {
                    a
                } else {
                    b
                }
            }
            Binary::Min => {
                if a < b || a.is_nan() {
                    a
                } else {
                    b
                }
            }
            Binary::Pow => a.powf(b),
        }
    }

    fn apply_int(self, a: i64, b: i64) -> i64 {
        match self {
            Binary::Add => a.wrapping_add(b),
            Binary::Sub => a.wrapping_sub(b),
            Binary::Mul => a.wrapping_mul(b),
            // Division by zero has no integer result; 0 keeps the evaluator total.
            Binary::Div => a.checked_div(b).unwrap_or(0),
            Binary::Max => a.max(b),
            Binary::Min => a.min(b),
            Binary::Pow => a.wrapping_pow(b.clamp(0, 63) as u32),
        }
    }
}

impl OpDef for Binary {
    named_by_variant!(Binary {
        Add = "add",
        Sub = "sub",
        Mul = "mul",
        Div = "div",
        Max = "max",
        Min = "min",
        Pow = "pow",
    });
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 2)?;
        same_kind(args[0], args[1])?;
        Ok(TensorType::new(args[0].dtype, broadcast_of(args)?))
    }
}

fn same_kind(a: &TensorType, b: &TensorType) -> Result<(), String> {
    if a.dtype == b.dtype || (a.dtype.is_float() && b.dtype.is_float()) {
        return Ok(());
    }
    Err(format!("{a} and {b} are not of one kind"))
}

impl Primitive for Binary {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let n = out.elements();
        let (ia, ib) = (args[0].broadcast_index(&out.shape), args[1].broadcast_index(&out.shape));
        let data = match (&args[0].data, &args[1].data) {
            (Data::Float(a), Data::Float(b)) => {
                Data::Float((0..n).map(|i| self.apply(a[ia.at(i)], b[ib.at(i)])).collect())
            }
            (Data::Int(a), Data::Int(b)) => {
                Data::Int((0..n).map(|i| self.apply_int(a[ia.at(i)], b[ib.at(i)])).collect())
            }
            _ => unreachable!("type rule: operands are of one kind"),
        };
        Tensor { ty: out.clone(), data }
    }
}

/// Comparisons of two operands of one kind. Result: bool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are the definitions
pub enum Compare {
    Equal,
    Less,
    LessEqual,
}

impl OpDef for Compare {
    named_by_variant!(Compare { Equal = "equal", Less = "less", LessEqual = "less_equal" });
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 2)?;
        same_kind(args[0], args[1])?;
        Ok(TensorType::new(DType::Bool, broadcast_of(args)?))
    }
}

impl Primitive for Compare {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        fn holds<T: PartialOrd>(kind: Compare, a: T, b: T) -> i64 {
            match kind {
                Compare::Equal => (a == b) as i64,
                Compare::Less => (a < b) as i64,
                Compare::LessEqual => (a <= b) as i64,
            }
        }
        let n = out.elements();
        let (ia, ib) = (args[0].broadcast_index(&out.shape), args[1].broadcast_index(&out.shape));
        let data = match (&args[0].data, &args[1].data) {
            (Data::Float(a), Data::Float(b)) => (0..n).map(|i| holds(*self, a[ia.at(i)], b[ib.at(i)])).collect(),
            (Data::Int(a), Data::Int(b)) => (0..n).map(|i| holds(*self, a[ia.at(i)], b[ib.at(i)])).collect(),
            _ => unreachable!("type rule: operands are of one kind"),
        };
        Tensor { ty: out.clone(), data: Data::Int(data) }
    }
}

/// `select`: the second operand where the first (bool) holds, else the third. Result: dtype of the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Select {}

impl OpDef for Select {
    attributes_by_serde!("select");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 3)?;
        if args[0].dtype != DType::Bool {
            return Err(format!("the condition is {}, which is not bool", args[0]));
        }
        same_kind(args[1], args[2])?;
        Ok(TensorType::new(args[1].dtype, broadcast_of(args)?))
    }
}

impl Primitive for Select {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let n = out.elements();
        let [ic, ia, ib] = [0, 1, 2].map(|i| args[i].broadcast_index(&out.shape));
        let Data::Int(cond) = &args[0].data else { unreachable!("type rule: the condition is bool") };
        let data = match (&args[1].data, &args[2].data) {
            (Data::Float(a), Data::Float(b)) => {
                Data::Float((0..n).map(|i| if cond[ic.at(i)] != 0 { a[ia.at(i)] } else { b[ib.at(i)] }).collect())
            }
            (Data::Int(a), Data::Int(b)) => {
                Data::Int((0..n).map(|i| if cond[ic.at(i)] != 0 { a[ia.at(i)] } else { b[ib.at(i)] }).collect())
            }
            _ => unreachable!("type rule: operands are of one kind"),
        };
        Tensor { ty: out.clone(), data }
    }
}

/// `cast`: the nearest value of another dtype, ties to even; floats to integers truncate and saturate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cast {
    /// Dtype of the result.
    pub dtype: DType,
}

impl OpDef for Cast {
    attributes_by_serde!("cast");
    fn infer(&self, args: &[&TensorType]) -> Result<TensorType, String> {
        expect_args(args, 1)?;
        Ok(args[0].with_dtype(self.dtype))
    }
    fn flops(&self, _: &[&TensorType], _: &TensorType) -> u64 {
        0
    }
}

impl Primitive for Cast {
    fn eval(&self, _: &Evaluator, args: &[&Tensor], out: &TensorType) -> Tensor {
        let range = |x: f64| match out.dtype {
            DType::I8 => x.clamp(-128.0, 127.0),
            DType::U8 => x.clamp(0.0, 255.0),
            DType::I32 => x.clamp(i32::MIN as f64, i32::MAX as f64),
            DType::U32 => x.clamp(0.0, u32::MAX as f64),
            _ => x,
        };
        let data = match (&args[0].data, out.dtype.is_float()) {
            (Data::Float(v), true) => Data::Float(v.clone()),
            (Data::Float(v), false) if out.dtype == DType::Bool => {
                Data::Int(v.iter().map(|&x| (x != 0.0) as i64).collect())
            }
            (Data::Float(v), false) => Data::Int(v.iter().map(|&x| range(x) as i64).collect()),
            (Data::Int(v), true) => Data::Float(v.iter().map(|&x| x as f64).collect()),
            (Data::Int(v), false) if out.dtype == DType::Bool => {
                Data::Int(v.iter().map(|&x| (x != 0) as i64).collect())
            }
            (Data::Int(v), false) => Data::Int(v.iter().map(|&x| range(x as f64) as i64).collect()),
        };
        Tensor { ty: out.clone(), data }
    }
}
