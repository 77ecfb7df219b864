//! Small graphs with one large call each, and a limit of tensors below which that has to be cut. Extents are odd, and no
//! weights are read, so that other crates can run them on devices.

use ltxc_ir::ops::{Attention, Conv, ConvTranspose, PadMode, ReduceKind, RopeLayout};
use ltxc_ir::{Builder, DType, Float, Module, Rate, TensorType, ValueId};

/// A graph that has to be cut.
pub struct Cuttable {
    pub name: &'static str,
    /// Entry `main`, with one result.
    pub module: Module,
    /// Bytes of the largest tensor that a target binds.
    pub limit: u64,
}

/// Parameters of a graph as they are asked for.
struct Params {
    b: Builder,
}

impl Params {
    fn of(&self, name: &str, dtype: DType, shape: &[usize]) -> ValueId {
        self.b.param(name, TensorType::new(dtype, shape.to_vec()), Rate::Step)
    }

    fn f32(&self, name: &str, shape: &[usize]) -> ValueId {
        self.of(name, DType::F32, shape)
    }
}

fn graph(name: &'static str, limit: u64, body: impl FnOnce(&Builder, &Params) -> ValueId) -> Cuttable {
    let params = Params { b: Builder::new("main") };
    let y = body(&params.b, &params);
    params.b.result("y", y);
    let function = params.b.finish().unwrap();
    Cuttable { name, module: Module { functions: vec![function], entries: vec!["main".into()] }, limit }
}

fn conv(stride: usize, pads: &[(usize, usize)]) -> Conv {
    let n = pads.len();
    Conv { stride: vec![stride; n], dilation: vec![1; n], pad: pads.to_vec(), groups: 1 }
}

/// A causal convolution over frames with what stands around it in a decoder: pads, bias, residual.
fn frames(b: &Builder, p: &Params, dtype: DType, shape: [usize; 5], mode: PadMode) -> ValueId {
    let x = p.of("x", dtype, &shape);
    let c = shape[4];
    let (w, bias) = (p.of("w", dtype, &[3, 3, 3, c, c]), p.of("bias", dtype, &[c]));
    let in_time = b.pad(x, &[0, 2, 0, 0, 0], &[0; 5], PadMode::Edge);
    let padded = b.pad(in_time, &[0, 0, 1, 1, 0], &[0, 0, 1, 1, 0], mode);
    let y = b.conv(conv(1, &[(0, 0); 3]), padded, w);
    b.silu(b.add(b.add(y, bias), x))
}

/// Queries and keys that are normed and turned, attention, and gates behind.
fn heads(b: &Builder, p: &Params, [n_batches, t, s]: [usize; 3], bias: Option<[usize; 4]>) -> ValueId {
    let (n, d) = (4, 8);
    let [q, k] = [("q", t), ("k", s)].map(|(name, rows)| {
        let tables = ["cos", "sin"].map(|table| p.f32(&format!("{name}_{table}"), &[1, rows, n, d / 2]));
        (p.f32(name, &[n_batches, rows, n * d]), tables)
    });
    let (v, gates) = (p.f32("v", &[n_batches, s, n, d]), p.f32("gates", &[n_batches, t, n, 1]));
    let bias = bias.map(|shape| p.f32("bias", &shape));
    let [q, k] = [(q, t), (k, s)].map(|((x, [cos, sin]), rows)| {
        let normed = b.reshape(b.rms_norm(x, None, 1e-6), &[n_batches, rows, n, d]);
        b.rope(normed, cos, sin, RopeLayout::Split)
    });
    let y = b.attention(Attention { scale: Float(0.3), causal: false }, q, k, v, bias);
    b.mul(y, b.sigmoid(gates))
}

/// All of them.
pub fn all() -> Vec<Cuttable> {
    vec![
        graph("attention by queries", 5000, |b, p| heads(b, p, [1, 67, 19], None)),
        graph("attention by queries, with a bias", 5000, |b, p| heads(b, p, [1, 67, 19], Some([1, 1, 67, 19]))),
        graph("attention by batches", 9000, |b, p| heads(b, p, [3, 67, 19], Some([3, 1, 1, 19]))),
        graph("attention by batches and queries", 5000, |b, p| heads(b, p, [3, 67, 19], Some([3, 1, 1, 19]))),
        graph("product of batches", 700, |b, p| {
            let (x, w, bias) = (p.f32("x", &[5, 9, 13]), p.f32("w", &[5, 13, 11]), p.f32("bias", &[11]));
            b.gelu(b.add(b.matmul(x, w), bias))
        }),
        graph("product of batches and rows", 700, |b, p| b.matmul(p.f32("x", &[3, 37, 8]), p.f32("w", &[3, 8, 11]))),
        graph("convolution by frames", 13000, |b, p| frames(b, p, DType::F32, [1, 7, 9, 10, 8], PadMode::Reflect)),
        graph("convolution by frames in bf16", 9000, |b, p| {
            frames(b, p, DType::BF16, [1, 7, 9, 10, 8], PadMode::Zeros)
        }),
        graph("convolution by batches and frames", 13000, |b, p| {
            frames(b, p, DType::F32, [2, 5, 9, 10, 8], PadMode::Edge)
        }),
        graph("convolution by rows of a picture", 4000, |b, p| {
            let (x, w, bias) = (p.f32("x", &[1, 21, 11, 6]), p.f32("w", &[3, 3, 6, 6]), p.f32("bias", &[6]));
            b.silu(b.add(b.conv(conv(1, &[(1, 1); 2]), x, w), bias))
        }),
        graph("convolution of what is activated", 4000, |b, p| {
            let (x, w) = (p.f32("x", &[1, 21, 11, 6]), p.f32("w", &[3, 3, 6, 6]));
            b.add(x, b.conv(conv(1, &[(1, 1); 2]), b.leaky_relu(x, 0.1), w))
        }),
        graph("convolution with a stride", 8000, |b, p| {
            b.conv(conv(2, &[(1, 2); 2]), p.f32("x", &[1, 27, 15, 6]), p.f32("w", &[3, 3, 6, 10]))
        }),
        graph("convolution that is stored as space", 8000, |b, p| {
            let (x, w, bias) = (p.f32("x", &[1, 9, 6, 8, 8]), p.f32("w", &[3, 3, 3, 8, 8]), p.f32("bias", &[8]));
            b.depth_to_space(b.add(b.conv(conv(1, &[(1, 1); 3]), x, w), bias), &[2, 2, 1])
        }),
        graph("convolution that is stored as pictures", 8000, |b, p| {
            let (x, w, bias) = (p.f32("x", &[1, 9, 6, 8, 8]), p.f32("w", &[3, 3, 3, 8, 8]), p.f32("bias", &[8]));
            b.depth_to_space(b.add(b.conv(conv(1, &[(1, 1); 3]), x, w), bias), &[1, 2, 2])
        }),
        graph("product that is split", 2000, |b, p| {
            let y = b.matmul(p.f32("x", &[1, 41, 8]), p.f32("w", &[8, 15]));
            let [q, k] = [(0, 7), (7, 15)].map(|(start, end)| b.slice_axis(y, 2, start, end));
            b.concat(&[b.silu(k), b.neg(q)], 2)
        }),
        graph("transposed convolution by batches", 3000, |b, p| {
            let op = ConvTranspose { stride: vec![2], dilation: vec![1], pad: vec![(3, 3)], groups: 1 };
            let (x, w) = (p.f32("x", &[3, 17, 8]), p.f32("w", &[4, 8, 12]));
            b.conv_transpose(op, b.pad(x, &[0, 1, 0], &[0, 1, 0], PadMode::Edge), w)
        }),
        graph("group norm by batches", 3000, |b, p| {
            let (x, weight, bias) = (p.f32("x", &[5, 13, 4, 12]), p.f32("weight", &[12]), p.f32("bias", &[12]));
            b.silu(b.group_norm(x, weight, bias, 3, 1e-5))
        }),
        graph("reduction", 2000, |b, p| b.reduce(ReduceKind::Mean, p.f32("x", &[7, 5, 11, 3]), &[1, 2])),
        graph("rows of a table", 1500, |b, p| b.gather(p.f32("x", &[9, 13]), p.of("i", DType::I32, &[57]), 0)),
        graph("inner rows", 1500, |b, p| b.gather(p.f32("x", &[11, 5, 7]), p.of("i", DType::I32, &[8]), 1)),
        graph("pad along the cut axis", 1500, |b, p| {
            b.pad(p.f32("x", &[23, 5, 4]), &[3, 1, 0], &[2, 0, 1], PadMode::Reflect)
        }),
        graph("transposed inside of the cut axis", 2000, |b, p| b.transpose(p.f32("x", &[9, 11, 7]), &[0, 2, 1])),
        graph("joined inside of the cut axis", 1500, |b, p| {
            b.concat(&[p.f32("x", &[17, 5, 3]), p.f32("y", &[17, 4, 3])], 1)
        }),
        graph("one long axis", 1000, |b, p| b.silu(p.f32("x", &[1237]))),
    ]
}
